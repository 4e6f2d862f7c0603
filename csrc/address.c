/* address.c - the public address functions. What an address looks like inside is the system's business (os.h). */
#include "os.h"

int an_address_ip(an_address *address, int family, const char *host, uint16_t port, uint32_t flow, uint32_t scope) {
    return an_os_address_ip(address, family, host, port, flow, scope);
}

int an_address_path(an_address *address, const char *path, size_t length) {
    return an_os_address_path(address, path, length);
}

int an_address_family(const an_address *address) { return an_os_address_family(address); }

int an_address_format(const an_address *address, char *host, uint16_t *port, uint32_t *flow, uint32_t *scope) {
    return an_os_address_format(address, host, port, flow, scope);
}

int an_address_format_path(const an_address *address, char *path, size_t *length) {
    return an_os_address_format_path(address, path, length);
}
