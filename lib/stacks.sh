# install.sh --demo and --test: one virtual environment per stack of tests/stacks/. Sourced by install.sh.
# shellcheck shell=bash

STACKS=(2023 2024 gptqmodel now) # the last also runs what runs once
# What no stack makes a difference to.
RUN_ONCE=('tests/stacks/*' 'tests/tools/test_simulated*' tests/engine/test_{gate,text}.py tests/webui/test_{faults,measuring,view}.py)
RESULTS="$ROOT/.venv/results"
SEED="$(date +%Y%m%d)" # of random tests: other ones each day, the same ones all day
MAX_WORKERS=4 # Each test process loads torch: a gigabyte of memory or so.

demo() { # DEMO_OPTION...
  local stack python
  for stack in now 2024 2023; do # The newest that runs here: `now` needs Python 3.11 or newer.
    if python="$(find_python "$stack")"; then
      ensure_stack "$stack" "$python" || exit 1
      exec "$(venv_python "$stack")" -m tools.demo "$@"
    fi
  done
  fail "The demo $(why_no_python now)"
}

run_tests() { # [--stack NAME] [-- PYTEST_OPTION...]
  local stacks=("${STACKS[@]}") is_whole=""
  [[ $# -gt 0 ]] || is_whole=yes # less than all tests runs less than all lines
  while [[ $# -gt 0 ]]; do
    case "$1" in
      --stack)
        [[ -n "${2:-}" && " ${STACKS[*]} " == *" $2 "* ]] || fail "--stack takes one of: ${STACKS[*]}." 2
        stacks=("$2")
        shift 2
        ;;
      --) shift && break ;;
      *) fail "'$1' is not an option of --test. Options for pytest come after --, as in: ./install.sh --test -- $1" 2 ;;
    esac
  done
  rm -rf -- "$RESULTS"
  mkdir -p -- "$RESULTS"
  without_network_and_noise
  local stack python command reporter="" covered="" coverage=()
  for stack in "${stacks[@]}"; do
    if ! python="$(find_python "$stack")"; then
      printf '%s: skipped, it %s\n' "$stack" "$(why_no_python "$stack")"
      record skip "$stack" 0 0
      continue
    fi
    if command="$(missing_command "$stack")"; then
      printf '%s: skipped, it needs %s: sudo apt-get install %s\n' "$stack" "$command" "$command"
      record skip "$stack" 0 0
      continue
    fi
    reporter="$python"
    if ! { ensure_stack "$stack" "$python" && lay_sources "$stack"; }; then
      record broken "$stack" "$STEP_SECONDS" 1
      continue
    fi
    [[ "$stack" != now ]] || run_checks
    coverage=()
    if [[ -n "$is_whole" && -n "$(covered_by "$stack")" ]]; then
      [[ "$stack" != now ]] || covered=yes # without its tests most lines do not run
      # Each run adds to what those before it have left.
      coverage=(--cov --cov-append --cov-report "json:$RESULTS/coverage.json" --covered-by "$(covered_by "$stack")")
    fi
    run_suite "$stack" "${stacks[-1]}" ${coverage[@]+"${coverage[@]}"} "$@"
  done
  [[ -z "$covered" ]] || record coverage coverage 0 0
  [[ -n "$reporter" ]] || fail "There is no Python for any of these stacks: ${stacks[*]}."
  "$reporter" tests/stacks/report.py "$RESULTS"
}

run_checks() {
  local python
  python="$(venv_python now)"
  check "ruff format" "$python" -m ruff format --check .
  check "ruff check" "$python" -m ruff check --output-format concise .
  check "mypy" "$python" -m mypy
}

check() { # NAME COMMAND...
  local status=0
  step "$@" || status=$?
  record check "$1" "$STEP_SECONDS" "$status"
}

run_suite() { # STACK LAST_STACK PYTEST_OPTION...
  local stack="$1" last="$2" status=0 started=$SECONDS workers chosen=()
  shift 2
  [[ "$stack" == "$last" ]] || chosen=("${RUN_ONCE[@]/#/--ignore-glob=}")
  while IFS= read -r file; do chosen+=("$file"); done < <(header "$stack" tests)
  workers="$(env -u OMP_NUM_THREADS nproc)" # nproc would answer with that variable
  printf '%s: running the tests, random ones from seed %s\n' "$stack" "$SEED"
  COVERAGE_FILE="$RESULTS/coverage" COVERAGE_CORE="$(coverage_core "$stack")" "$(venv_python "$stack")" -m pytest -n "$((workers < MAX_WORKERS ? workers : MAX_WORKERS))" --dist worksteal \
    --hypothesis-seed "$SEED" -o cache_dir=".venv/$stack/.pytest_cache" --junitxml "$RESULTS/$stack.xml" ${chosen[@]+"${chosen[@]}"} "$@" || status=$?
  record stack "$stack" "$((SECONDS - started))" "$status"
}

covered_by() { # STACK: the test files during which coverage is measured, which takes up to half as long again
  case "$1" in
    2023) printf 'test_sharding.py' ;; # caches that are tuples
    2024) printf 'test_kv.py' ;; # caches that are lists
    now)
      printf '%s ' test_kv.py test_checkpoints.py test_gate.py test_graphs.py test_host_of_hooks.py test_compare.py test_measuring.py \
        test_meter.py test_placement.py test_prompts.py test_sharding.py test_capture.py test_transfers.py test_text.py \
        test_states.py test_attention.py test_uses.py test_windows.py \
        test_extension.py test_faults.py test_panel.py test_settings.py test_view.py test_watch.py
      ;;
  esac
}

coverage_core() { # STACK: what costs least on its Python, which has sys.monitoring since 3.12
  case "$(version_of "$(venv_python "$1")")" in
    3.10 | 3.11) printf 'ctrace' ;;
    *) printf 'sysmon' ;;
  esac
}

record() { # KIND NAME SECONDS STATUS: one line for tests/stacks/report.py
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$RESULTS/steps.tsv"
}

without_network_and_noise() {
  # Models are made here, never fetched; a test that would ask the hub fails instead of hanging.
  export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 GRADIO_ANALYTICS_ENABLED=False
  export TOKENIZERS_PARALLELISM=false
  # Tiny models: threads of one test process would only take the cores of the others.
  export OMP_NUM_THREADS=1
}

# --- one virtual environment per stack ----------------------------------------------------------------------------------

requirements() { # STACK
  printf '%s/tests/stacks/%s.txt' "$ROOT" "$1"
}

venv_python() { # STACK
  printf '%s/.venv/%s/bin/python' "$ROOT" "$1"
}

ensure_stack() { # STACK PYTHON: makes or renews .venv/STACK where its stamp says something else than the files do
  local stack="$1" python="$2" venv="$ROOT/.venv/$1" stamp
  stamp="$(cat -- "$(requirements "$stack")" "$(requirements tools)" | sha256sum) $("$python" -VV)"
  if [[ "$(cat -- "$venv/stamp" 2>/dev/null)" == "$stamp" ]] && "$(venv_python "$stack")" -c "" 2>/dev/null; then
    return
  fi
  rm -rf -- "$venv"
  mkdir -p -- "$ROOT/.venv"
  # Wheels only: a missing one is an error at once, not half an hour of compiling.
  step "$stack: making an environment with $("$python" -V)" "$python" -m venv "$venv" &&
    step "$stack: installing $(pin "$stack" torch), $(pin "$stack" transformers) and more (minutes, once)" \
      "$(venv_python "$stack")" -m pip install -qq --disable-pip-version-check --no-input --only-binary :all: \
      -r "$(requirements "$stack")" &&
    printf '%s\n' "$stamp" >"$venv/stamp"
}

lay_sources() { # STACK: unpacks source distributions into .venv/STACK/src, for the tests that only they have
  local folder="$ROOT/.venv/$1/src" name version
  for name in $(header "$1" sources); do
    read -r _ version < <(pin "$1" "$name")
    [[ -d "$folder/$name-$version" ]] ||
      step "$1: fetching the tests of $name $version" fetch_source "$(venv_python "$1")" "$folder" "$name" "$version" || return
  done
}

fetch_source() { # PYTHON FOLDER NAME VERSION: all of it or nothing
  local part="$2/.part"
  rm -rf -- "$part"
  mkdir -p -- "$part"
  "$1" -m pip download -qq --disable-pip-version-check --no-input --no-deps --no-binary "$3" -d "$part" "$3==$4" &&
    tar -xzf "$part/$3-$4.tar.gz" -C "$part" && mv -- "$part/$3-$4" "$2/" && rm -r -- "$part"
}

pin() { # STACK PACKAGE: as "torch 2.13.0"
  sed -n "s/^\($2\)==\([^; ]*\).*/\1 \2/p" -- "$(requirements "$1")"
}

STEP_SECONDS=0
step() { # LABEL COMMAND...: one line with how long it took; what the command says is shown if it fails
  local label="$1" started=$SECONDS status=0 output
  shift
  printf '%s ... ' "$label"
  output="$("$@" 2>&1)" || status=$?
  STEP_SECONDS=$((SECONDS - started))
  if [[ $status -ne 0 ]]; then
    printf 'failed after %d s\n%s\n' "$STEP_SECONDS" "$output"
    return "$status"
  fi
  printf '%d s\n' "$STEP_SECONDS"
}

# --- finding a Python ---------------------------------------------------------------------------------------------------

header() { # STACK KEY: what "# KEY: ..." of its requirements says: pythons, commands and sources it needs, tests if not all
  sed -n "s/^# $2: //p" -- "$(requirements "$1")"
}

find_python() { # STACK: prints the first Python that suits it and can make environments
  local version candidate
  while IFS= read -r candidate; do
    version="$(version_of "$candidate")" || continue
    [[ " $(header "$1" pythons) " == *" $version "* ]] || continue
    if "$candidate" -c "import ensurepip, venv" 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done < <(pythons_here)
  return 1
}

pythons_here() { # every Python worth asking, the preferred ones first
  local name
  for name in "${PYTHON:-}" python3 python3.11 python3.12 python3.13 python3.10; do
    [[ -z "$name" ]] || command -v -- "$name" || true
  done
  [[ -z "${HOME:-}" ]] || compgen -G "$HOME/.pyenv/versions/*/bin/python" || true
}

version_of() { # PYTHON: as "3.11"
  "$1" -c 'import sys; print("{}.{}".format(*sys.version_info))' 2>/dev/null
}

missing_command() { # STACK: prints the first command that installing it needs and that is not here, if any
  local command
  for command in $(header "$1" commands); do
    command -v -- "$command" >/dev/null || { printf '%s' "$command" && return; }
  done
  return 1
}

why_no_python() { # STACK: the end of a sentence
  local candidate version wanted
  wanted="$(header "$1" pythons)"
  while IFS= read -r candidate; do
    version="$(version_of "$candidate")" || continue
    if [[ " $wanted " == *" $version "* ]]; then
      printf 'needs the venv module of Python %s: sudo apt-get install python3-venv' "$version"
      return
    fi
  done < <(pythons_here)
  printf 'needs Python %s, which this machine does not have.' "${wanted// / or }"
}
