/* perform.h - performing operations by calls that do not block, for backends that learn when a socket may be tried.
 *
 * The functions with a backend as first argument fit backend.h as they are. socket.lock is held for all; what receives is
 * the leader's alone.
 */
#ifndef AN_PERFORM_H
#define AN_PERFORM_H

#include "backend.h"

/* What a pass receives before the user gets to see it, give or take one receive: by calls, and as much again where the
 * system receives by itself. More would push out of the processor's cache what was received first, before it is used: an
 * echo of 256 KiB messages cost a third more (bench/README.md). */
enum { AN_PASS_BYTES = 256 << 10 };

enum attempt an_perform_try_send(struct an_backend *backend, an_socket *socket, struct operation *operation,
                                 int *error);
void an_perform_start(struct an_backend *backend, an_socket *socket, struct operation *operation);
void an_perform_proceed(struct an_backend *backend, an_socket *socket, struct an_direction *direction);
/* Sends what waits, as far as the socket is ready and its share of a pass goes. */
void an_perform_transmit(an_socket *socket);
/* Receives for the operations that wait, likewise. Leader. */
void an_perform_receive(an_socket *socket);
/* Both, as far as the socket's state allows. Leader. */
void an_perform_both(an_socket *socket);

/* ---- for a backend whose system receives by itself. Leader ----------------------------------------------------------------- */

/* Whether the first receive must stand still although something may be there: paused, held back, too far ahead. */
bool an_perform_stands_still(an_socket *socket, const struct operation *operation);
/* `length` bytes of a stream (0: its end) for the first receive. `block` holds them: the pool's last offer, with room for
 * them; NULL if they are in the operation's own buffer or it is the end. */
void an_perform_received(an_socket *socket, struct operation *operation, struct an_block *block, size_t length);
/* A connection for the first accept. `block` is the pool's last offer, with its address. */
void an_perform_accepted(an_socket *socket, struct operation *operation, struct an_block *block, an_socket *accepted);
/* What the system said instead. */
void an_perform_receive_failed(an_socket *socket, struct operation *operation, int error);
void an_perform_accept_failed(an_socket *socket, struct operation *operation, int error);
/* There was no memory to deliver: a timer looks again. */
void an_perform_retry_receive(an_socket *socket);

/* ---- for a backend whose system sends and connects by itself: what came of the first of the transmit direction --------------- */

/* Copies up to `most` bytes of a send that have not gone out; returns how many. */
size_t an_perform_copy(const struct operation *operation, char *room, size_t most);
/* `bytes` of a send or file have gone out; it stays where it is. */
void an_perform_count(an_socket *socket, struct operation *operation, uint64_t bytes);
/* The same, and completes it when it is done: whole, or at the end of its file. */
void an_perform_sent(an_socket *socket, struct operation *operation, uint64_t bytes);
void an_perform_send_failed(an_socket *socket, int error);
void an_perform_connected(an_socket *socket, struct operation *operation, int error);
/* There was no memory to begin: a timer looks again. */
void an_perform_retry_transmit(an_socket *socket);

#endif
