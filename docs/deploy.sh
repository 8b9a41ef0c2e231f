#!/bin/sh
# deploy.sh RELEASE: switch `current` to RELEASE and reload; when that is given up, switch back.
#
# RELEASE is a directory, as `current` is to name it: releases/43, or an absolute path. Where: SITE is the directory of
# `current`, PIDFILE the server's pidfile, TIMEOUT the seconds that the reload may take, APPHOST the command.
# Exit code: 0 when every worker runs RELEASE, else that of `apphost reload --wait`, or 1 when it did not come so far.
# Interrupted (INT, TERM, HUP), it switches back as after a failure.
set -eu

release=${1:?usage: deploy.sh RELEASE}
site=${SITE:-/srv/site}
pidfile=${PIDFILE:-/run/site/pid}
timeout=${TIMEOUT:-300}
apphost=${APPHOST:-$site/current/.venv/bin/python -m apphost}

cd "$site"
test -d "$release" || { echo "deploy: there is no directory $release in $site" >&2; exit 1; }

# One deploy at a time: of two, the first would roll back what the second has switched to.
exec 9>deploy.lock
flock --nonblock 9 || { echo "deploy: another deploy is running" >&2; exit 1; }

switch_to() {
    ln -sfn "$1" current.new
    mv -T current.new current # in one step: at every moment `current` names a whole release
}

reload() {
    # Unquoted: it may be several words. The lock must not be inherited by what might outlive this script.
    $apphost reload --wait --timeout "$timeout" --pidfile "$pidfile" 9>&- &
    child=$!
    wait "$child" # a signal ends this at once, and not a command in the foreground
}

previous=$(readlink current) || { echo "deploy: $site/current is no symbolic link" >&2; exit 1; }
code=0
child=
trap 'kill "$child" 2>/dev/null || :' INT TERM HUP
switch_to "$release"
reload || code=$?
# Overtaken by a reload that was asked for later, as logrotate does. It is of the same release: see how that goes.
if [ "$code" -eq 9 ]; then
    code=0
    reload || code=$?
fi
trap '' INT TERM HUP # a rollback is not left half-way
if [ "$code" -eq 0 ]; then
    echo "deploy: $release serves"
    exit 0
fi

# The old workers serve on, but one that has to be started later would read what `current` names: so back with it.
switch_to "$previous"
echo "deploy: $release is not served (exit code $code), back to $previous" >&2
case $code in
    8) ;; # given up: no worker of the new code is left
    *) # too slow, or overtaken by another reload: some workers may be of the new code
        reload || echo "deploy: the reload of $previous has failed, too: see the log of the server" >&2
        ;;
esac
exit "$code"
