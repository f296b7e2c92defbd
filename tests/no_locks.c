/* A file system without locks, as some Lustre and NFS mounts are: LD_PRELOAD this. */
#include <errno.h>
#include <stdlib.h>

int flock(int descriptor, int operation) {
    (void)descriptor, (void)operation;
    errno = atoi(getenv("NO_LOCKS_ERRNO"));
    return -1;
}
