/* A disk that fails, or a power cut, at a chosen call: preloaded (LD_PRELOAD) before the C library's own functions.

   Every call that changes what lies under the folder `root` is a moment, numbered from 0. `disk_arm` says at which of
   them what happens: nothing is done before it in another way. A write that is cut short has written its first half.

     COUNT  nothing; `disk_moments` tells how many there were
     KILL   SIGKILL at moment `at`
     FULL   from moment `at` on, whatever needs space fails with ENOSPC; what frees space works
     BROKEN moment `at` alone fails with EIO
     ASK    at moment `at` the process gets SIGTERM, ASK + 1: SIGINT; the call goes on
     TRACE  every moment is written to the file descriptor `at`, as lines `call inode path`
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FULL, BROKEN, TRACE, ASK };
enum { GOES_ON, FAILS, HALF };

static char root[PATH_MAX];
static int mode;
static long at, moments;

void disk_arm(const char *folder, int how, long when) {
    snprintf(root, sizeof root, "%s", folder);
    mode = how, at = when, moments = 0;
}

long disk_moments(void) { return __atomic_load_n(&moments, __ATOMIC_SEQ_CST); }

static int is_inside(const char *path) {
    return *root && !strncmp(path, root, strlen(root));
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

/* The path that a name stands for beside an open folder. */
static const char *resolve(int folder, const char *name, char *path) {
    if (*name == '/') return name;
    if (folder == AT_FDCWD ? !getcwd(path, PATH_MAX) : !path_of(folder, path)) return name;
    size_t length = strlen(path);
    snprintf(path + length, PATH_MAX - length, "/%s", name);
    return path;
}

static int moment(const char *call, const char *path, int needs_space) {
    if (!is_inside(path)) return GOES_ON;
    long now = __atomic_fetch_add(&moments, 1, __ATOMIC_SEQ_CST);
    if (mode == TRACE) {
        struct stat found;
        dprintf((int)at, "%s %ld %s\n", call, stat(path, &found) ? 0 : (long)found.st_ino, path);
    }
    if (mode == KILL && now == at) return HALF;
    if (mode >= ASK && now == at) kill(getpid(), mode == ASK ? SIGTERM : SIGINT);
    if (mode == BROKEN && now == at) return errno = EIO, FAILS;
    if (mode == FULL && needs_space && now == at) return errno = ENOSPC, HALF;
    if (mode == FULL && needs_space && now > at) return errno = ENOSPC, FAILS;
    return GOES_ON;
}

static void die(void) {
    if (mode == KILL) kill(getpid(), SIGKILL);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define UNLESS_STOPPED(call, path, needs_space) \
    if (moment(call, path, needs_space) != GOES_ON) { die(); return -1; }

#define OPEN_AT(name, real, folder, parameters, ...) \
    int name parameters { \
        mode_t bits = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); bits = va_arg(rest, mode_t); va_end(rest); } \
        char full[PATH_MAX]; \
        if (flags & (O_CREAT | O_TRUNC)) { UNLESS_STOPPED("open", resolve(folder, path, full), 1) } \
        return NEXT(real)(__VA_ARGS__, flags, bits); \
    }
OPEN_AT(open, open, AT_FDCWD, (const char *path, int flags, ...), path)
OPEN_AT(open64, open64, AT_FDCWD, (const char *path, int flags, ...), path)
OPEN_AT(openat, openat, folder, (int folder, const char *path, int flags, ...), folder, path)
OPEN_AT(openat64, openat64, folder, (int folder, const char *path, int flags, ...), folder, path)

/* fd, its path, and what the first half of the bytes is: written before the end, so that files are cut anywhere. */
#define WRITE(name, parameters, half, ...) \
    ssize_t name parameters { \
        char path[PATH_MAX]; \
        switch (*root && path_of(fd, path) ? moment("write", path, 1) : GOES_ON) { \
            case FAILS: return -1; \
            case HALF: { \
                ssize_t written = (half) ? (half) : -1; \
                die(); \
                if (written < 0) errno = ENOSPC; \
                return written; \
            } \
        } \
        return NEXT(name)(fd, __VA_ARGS__); \
    }
WRITE(write, (int fd, const void *from, size_t size), size > 1 ? NEXT(write)(fd, from, size / 2) : 0, from, size)
WRITE(pwrite, (int fd, const void *from, size_t size, off_t to), size > 1 ? NEXT(pwrite)(fd, from, size / 2, to) : 0, from, size, to)
WRITE(pwrite64, (int fd, const void *from, size_t size, off64_t to), size > 1 ? NEXT(pwrite64)(fd, from, size / 2, to) : 0, from, size, to)
WRITE(writev, (int fd, const struct iovec *from, int count), count > 1 ? NEXT(writev)(fd, from, count / 2) : 0, from, count)

#define OF_FILE(name, call, needs_space, parameters, ...) \
    int name parameters { \
        char path[PATH_MAX]; \
        if (*root && path_of(fd, path)) { UNLESS_STOPPED(call, path, needs_space) } \
        return NEXT(name)(__VA_ARGS__); \
    }
OF_FILE(fsync, "fsync", 1, (int fd), fd)
OF_FILE(fdatasync, "fsync", 1, (int fd), fd)
OF_FILE(ftruncate, "truncate", 1, (int fd, off_t size), fd, size)
OF_FILE(ftruncate64, "truncate", 1, (int fd, off64_t size), fd, size)

#define OF_NAME(name, call, needs_space, folder, parameters, ...) \
    int name parameters { \
        char full[PATH_MAX]; \
        UNLESS_STOPPED(call, resolve(folder, path, full), needs_space) \
        return NEXT(name)(__VA_ARGS__); \
    }
OF_NAME(mkdir, "mkdir", 1, AT_FDCWD, (const char *path, mode_t bits), path, bits)
OF_NAME(rmdir, "delete", 0, AT_FDCWD, (const char *path), path)
OF_NAME(unlink, "delete", 0, AT_FDCWD, (const char *path), path)
OF_NAME(unlinkat, "delete", 0, folder, (int folder, const char *path, int flags), folder, path, flags)

OF_NAME(rename, "rename", 0, AT_FDCWD, (const char *path, const char *to), path, to)
