/* Preloaded: a file system that can't do what FAULTS names. test_file_systems builds it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int has(const char *fault) {
    const char *faults = getenv("FAULTS");
    return faults != NULL && strstr(faults, fault) != NULL;
}

int fsync(int descriptor) { /* CIFS, some FUSE */
    struct stat found;
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    if (has("fsync") && fstat(descriptor, &found) == 0 && S_ISDIR(found.st_mode)) {
        errno = EINVAL;
        return -1;
    }
    return real(descriptor);
}

int rename(const char *from, const char *to) { /* unions, such as mergerfs */
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    if (has("rename")) {
        errno = EXDEV;
        return -1;
    }
    return real(from, to);
}

int flock(int descriptor, int operation) { /* Lustre */
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    if (has("flock")) {
        errno = ENOSYS;
        return -1;
    }
    return real(descriptor, operation);
}
