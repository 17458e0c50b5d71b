#!/usr/bin/env bash
# Puts the extension into a webui, by install.py; sets up the demo and the tests, in environments under .venv/, and runs
# them.
set -euo pipefail

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
  local action="${1:-}"
  [[ $# -eq 0 ]] || shift
  [[ -z "${PYTHON:-}" ]] || version_of "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a Python that runs." 2
  case "$action" in
    --demo) cd -- "$ROOT" && demo "$@" ;;
    --test) cd -- "$ROOT" && run_tests "$@" ;;
    --help | -h) usage ;;
    "") usage >&2 && exit 2 ;;
    *) webui "$action" "$@" ;;
  esac
}

webui() { # WEBUI [OPTION...]
  local argument python
  for argument in "$@"; do
    [[ "$argument" != --help && "$argument" != -h ]] || { usage && exit; }
  done
  python="$(python_for_installer "$@")" || fail "install.sh needs Python 3.8 or newer, which this machine does not have."
  exec "$python" -I "$ROOT/install.py" "$@"
}

python_for_installer() { # WEBUI [OPTION...]: prints the first Python that install.py runs on, if need be the webui's own
  local candidate
  while IFS= read -r candidate; do
    if "$candidate" -I -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done < <(pythons_here && printf '%s/installer_files/env/bin/python\n' "$@")
  return 1
}

fail() { # MESSAGE [EXIT_STATUS]
  printf '%s\n' "$1" >&2
  exit "${2:-1}"
}

# shellcheck source=lib/stacks.sh
source "$ROOT/lib/stacks.sh"
main "$@"
