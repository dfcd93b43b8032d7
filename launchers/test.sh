#!/usr/bin/env bash
# Sets up and runs every check: style, import contracts, types, tests. Arguments go to pytest.
#
#   bash launchers/test.sh                        everything
#   bash launchers/test.sh tests/unit -k units    some tests
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$repository"

# One thread a process: the distributed tests run several ranks on few cores.
export OMP_NUM_THREADS=1
# Ray: no usage reports, every rank's log lines, workers in this very environment, no killing by memory pressure.
export RAY_USAGE_STATS_ENABLED=0 RAY_DEDUP_LOGS=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 RAY_memory_monitor_refresh_ms=0

ruff check --quiet .
ruff format --quiet --check .
lint-imports --no-cache >/dev/null || lint-imports --no-cache
mypy
if [ $# -gt 0 ]; then
    exec pytest "$@"
fi
# Tests that start no group of ranks and no cluster run two at a time; the others, which measure times, one by one.
alone=(tests/unit tests/architecture)
status=0
pytest -n 2 --dist loadfile "${alone[@]}" || status=$?
pytest "${alone[@]/#/--ignore=}" || status=$?
exit "$status"
