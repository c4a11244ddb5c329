#!/bin/sh
# The tests on other days, in other zones and orders, in a folder with a space and an umlaut, as a user who is not root.
#
#   tests/anyday.sh                     all of CONDITIONS, one after the other: as many times what `make test` takes
#   tests/anyday.sh 3                   the third of them
#   tests/anyday.sh 3 tests/serve -x    the third, with words for pytest
#
# Wants what `make test` installed, and `apt-get install faketime`. A copy of the checkout is tested, with the changes of
# tracked files that are not committed yet; PYTHON=... names another Python than that of .venv.
set -eu
cd "$(dirname "$0")/.."

# The moment at which the tests start, the zone, the seed of the order.
CONDITIONS="
2027-02-28T23:58:30 Asia/Kathmandu 1
2028-02-29T12:00:00 America/St_Johns 2
2031-10-26T00:59:30 Asia/Kathmandu 3
2036-12-31T23:58:30 America/St_Johns 1
2039-01-20T03:00:00 Asia/Kathmandu 2
"

python=$(realpath -s "${PYTHON:-.venv/bin/python}")
[ -x "$python" ] || { echo "there is no $python; make test brings it" >&2; exit 2; }
faketime=$(ls /usr/lib/*/faketime/libfaketimeMT.so.1 2>/dev/null) || { echo "there is no faketime here: apt-get install faketime" >&2; exit 2; }
only=
case "${1:-}" in [1-9]) only=$1; shift ;; esac
[ $# -gt 0 ] || set -- -n 2

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
trap 'exit 130' INT TERM
checkout="$place/a b ü"
git clone -q . "$checkout"
git diff --binary HEAD | git -C "$checkout" apply --index --allow-empty
home="$place/at höme"
mkdir "$home" "$place/tmp" "$place/compiled"

as_nobody=
if [ "$(id -u)" = 0 ]; then
    # The one right that is kept: to read root's Python and packages, wherever they lie.
    as_nobody="setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    chown -R nobody:nogroup "$place"
fi
# libfaketime 0.9.10 answers EINVAL to clock_nanosleep, by which Python sleeps, where the monotonic clock is not faked.
cat > "$place/sleep.c" <<'END'
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    return syscall(SYS_clock_nanosleep, clock, flags, until, left) ? errno : 0;
}
END
cc -shared -fPIC -D_GNU_SOURCE -o "$place/sleep.so" "$place/sleep.c"

[ ! -d node_modules ] || ln -s "$PWD/node_modules" "$checkout"
[ ! -d ../shared ] || ln -s "$(realpath ../shared)" "$place"

run() {
    moment=$1 zone=$2 seed=$3
    shift 3
    echo "--- $moment, $zone, order $seed, user $($as_nobody id -un): $checkout"
    # An offset, so that files and processes agree on the time. It is another one each time, and with it the date that
    # Python reads from its sources: compiled ones are kept apart. Monotonic clocks, which timeouts go by, stay as they are.
    offset=$(($(TZ=$zone date -d "$moment" +%s) - $(date +%s)))
    (
        cd "$checkout"
        $as_nobody env -u XDG_CACHE_HOME -u PYTHONDONTWRITEBYTECODE HOME="$home" TMPDIR="$place/tmp" TZ="$zone" PYTHONPATH="$checkout" \
            PYTHONPYCACHEPREFIX="$place/compiled/$number" FAKETIME_DONT_FAKE_MONOTONIC=1 DONT_FAKE_MONOTONIC=1 \
            OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
            LD_PRELOAD="$place/sleep.so:$faketime" FAKETIME="+$offset" "$python" -m pytest -q -p no:cacheprovider --order-seed "$seed" "$@"
    )
}

number=0 failed=
for condition in $(echo "$CONDITIONS" | tr ' ' ,); do
    number=$((number + 1))
    [ -z "$only" ] || [ "$only" = "$number" ] || continue
    # shellcheck disable=SC2046
    run $(echo "$condition" | tr , ' ') "$@" || failed="$failed $number"
done
[ -z "$failed" ] || { echo "failed under condition$failed" >&2; exit 1; }
