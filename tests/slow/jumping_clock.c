/* The time of day plus an offset in seconds, read at each call from the file $CLOCK_OFFSET; other clocks are left alone.
 *
 *     cc -shared -fPIC -o jumping_clock.so jumping_clock.c -ldl
 *     CLOCK_OFFSET=/path/to/file LD_PRELOAD=./jumping_clock.so python ...
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset_s(void) {
    const char *path = getenv("CLOCK_OFFSET");
    char text[32] = "";
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    return size > 0 ? strtol(text, NULL, 10) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    /* The system call itself: dlsym may ask for the time. */
    long status = syscall(SYS_clock_gettime, clock, now);
    if (!status && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset_s();
    return (int)status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    long status = syscall(SYS_gettimeofday, now, zone);
    if (!status) now->tv_sec += offset_s();
    return (int)status;
}

time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}
