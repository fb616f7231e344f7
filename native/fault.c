/* A mapped file that is cut short, or whose disk fails, raises SIGBUS at the next read of it. */
#include "api.h"

#ifdef _WIN32 /* a mapped file cannot be cut short there */

void edge_exit_on_bus_error(const char *text) { (void)text; }

#else

#include <signal.h>
#include <string.h>
#include <unistd.h>

static char message[256];
static size_t n_message;

/* A signal handler: it calls only what is safe in one. */
static void print_and_exit(int number) {
    (void)number;
    (void)!write(STDERR_FILENO, message, n_message);
    _exit(1);
}

void edge_exit_on_bus_error(const char *text) {
    n_message = strnlen(text, sizeof message);
    memcpy(message, text, n_message);
    signal(SIGBUS, print_and_exit); /* not sigaction: its struct is another one on Android */
}

#endif
