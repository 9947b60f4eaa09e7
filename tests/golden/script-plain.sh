#!/usr/bin/env bash
# One worker of rq-fleet on this machine; made by `fleet script`. What is said to this script is said to the
# worker (--name N, --slots N). SIGTERM or Ctrl-C ends both, running jobs in order; a second one hurries. The
# worker ends, too, where this script is killed.
set -euo pipefail

export FLEET_REDIS_URL=redis://10.0.0.5:7/0

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

fleet=/opt/rq-fleet/bin/fleet
[[ -x $fleet ]] || fleet=$(command -v fleet) || fail "rq-fleet is not installed here, nor on PATH:" /opt/rq-fleet/bin/fleet

# What jobs leave among temporary files goes with the worker.
TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/rq-fleet.XXXXXXXX")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

# Reads the worker's PID, and then that it is over, from a pipe that this script alone holds open. Where the pipe
# ends without that, the script was killed.
watch() {
    trap '' TERM INT HUP
    local pid
    read -r pid || return 0
    if read -r; then return 0; fi
    kill -TERM "$pid" || return 0
    for ((second = 0; second < 16; second++)); do
        kill -0 "$pid" || break
        sleep 1
    done
    kill -KILL "$pid" || true
    rm -rf "$TMPDIR"
} 2>/dev/null

worker=
is_told=
end() {
    if [[ -n $worker ]]; then kill -TERM "$worker" || true; else is_told=yes; fi
}
trap end TERM INT HUP

# In process groups of their own: Ctrl-C reaches the worker through this script alone, and what kills this script's
# group leaves the watch.
set -m
mkfifo "$TMPDIR/alive"
watch <"$TMPDIR/alive" &
exec 9>"$TMPDIR/alive"
rm "$TMPDIR/alive"
# shellcheck disable=SC2016 # a $ in a value is meant as one
"$fleet" worker --queues default "$@" </dev/null 9>&- &
worker=$!
set +m
echo "$worker" >&9
[[ -z $is_told ]] || end

# A signal cuts `wait` short, and the worker is still there.
while kill -0 "$worker" 2>/dev/null; do wait "$worker" || true; done
code=0
wait "$worker" || code=$?
(echo over >&9) 2>/dev/null || true  # who killed the worker listens no more
exit "$code"
