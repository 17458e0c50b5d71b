#!/usr/bin/env bash
# Puts the extension into a webui; sets up the demo and the tests, in environments under .venv/, and runs them.
set -euo pipefail

CALLED_FROM="$PWD"
ROOT="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"

usage() {
  cat <<'TEXT'
sharded_kv: makes accelerate's multi-GPU generation fast.

  ./install.sh WEBUI             puts the extension into the text-generation-webui in the folder WEBUI: links it, and
                                 installs what it needs into the webui's environment, next to what is there
  ./install.sh WEBUI --copy      ... as a copy: this clone may go afterwards
  ./install.sh WEBUI --enable    ... and has the webui load it at every start (in CMD_FLAGS.txt)
  ./install.sh WEBUI --uninstall takes all of that out again

  ./install.sh --demo [OPTION...]            spreads a tiny model over GPUs, real or simulated; options go to the demo
  ./install.sh --test                        runs the checks and the tests on every stack of tests/stacks/
  ./install.sh --test --stack now            ... on one stack (2023, 2024, gptqmodel or now)
  ./install.sh --test -- -k llama            ... with options for pytest
  ./install.sh --help                        this text

What the demo and the tests need is installed into .venv/ beside this script, once; delete the folder to start afresh.
PYTHON=/path/to/python3.11 ./install.sh ...  uses that Python where a stack runs on it.
TEXT
}

main() {
  cd -- "$ROOT"
  local action="${1:-}"
  [[ $# -eq 0 ]] || shift
  [[ -z "${PYTHON:-}" ]] || version_of "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a Python that runs." 2
  case "$action" in
    --demo) demo "$@" ;;
    --test) run_tests "$@" ;;
    --help | -h) usage ;;
    "") usage >&2 && exit 2 ;;
    *) webui "$action" "$@" ;;
  esac
}

fail() { # MESSAGE [EXIT_STATUS]
  printf '%s\n' "$1" >&2
  exit "${2:-1}"
}

# shellcheck source=lib/webui.sh
source "$ROOT/lib/webui.sh"
# shellcheck source=lib/stacks.sh
source "$ROOT/lib/stacks.sh"
main "$@"
