/* A mapped file that is cut short, or whose disk fails, raises SIGBUS at the next read of it. */
#include "api.h"

#ifdef _WIN32 /* where a file that is mapped cannot be cut short */

void edge_exit_on_bus_error(const char *text) { (void)text; }

#else

#include <signal.h>
#include <string.h>
#include <unistd.h>

static char said[256];
static size_t n_said;

/* Only what a handler may call. */
static void say_and_exit(int number) {
    (void)number;
    (void)!write(STDERR_FILENO, said, n_said);
    _exit(1);
}

void edge_exit_on_bus_error(const char *text) {
    n_said = strnlen(text, sizeof said);
    memcpy(said, text, n_said);
    signal(SIGBUS, say_and_exit); /* not sigaction, whose struct is another one on Android */
}

#endif
