/* What Android's C library calls the place of errno, for libraries that look for it elsewhere. */
#include <errno.h>

int *__errno(void);
int *__errno(void) { return &errno; }
