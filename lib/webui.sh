# install.sh WEBUI: puts the extension into a text-generation-webui, and takes it out again. Sourced by install.sh.
# shellcheck shell=bash

webui() { # WEBUI [--copy] [--enable] or WEBUI --uninstall, in any order
  local path="" copy=false enable=false uninstall=false
  while [[ $# -gt 0 ]]; do
    case "$1" in
      --copy) copy=true ;;
      --enable) enable=true ;;
      --uninstall) uninstall=true ;;
      --help | -h) usage && exit ;;
      -*) fail "'$1' is not something install.sh does: ./install.sh --help tells what is." 2 ;;
      *)
        [[ -z "$path" ]] || fail "One webui at a time: '$path' or '$1'? (A path with spaces needs quotes.)" 2
        path="$1"
        ;;
    esac
    shift
  done
  [[ -n "$path" ]] || fail "Which webui? As in: ./install.sh /path/to/text-generation-webui" 2
  [[ "$uninstall" == false || "$copy$enable" == falsefalse ]] || fail "--uninstall goes without --copy and --enable." 2
  read_webui "$path"
  if [[ "$uninstall" == true ]]; then
    take_out
  else
    put_in "$copy" "$enable"
  fi
}

# --- the webui: what it wants where ------------------------------------------------------------------------------------

NAME=sharded_kv
SOURCE="$ROOT/extensions/$NAME"
MARKER=.installed_by_install.sh # In a copy that --copy made: a folder of that name without it is somebody else's.

WEBUI=""         # its folder, as given: links are not followed, what lies beside it counts
EXTENSIONS=""    # the folder where this version looks for the user's extensions
LAUNCHER=""      # the folder with start_linux.sh, where the one-click installer keeps its environment; "" without one
FLAGS=""         # CMD_FLAGS.txt; "" where this version has none
FLAGS_READ_BY="" # server: however it is started; launcher: through start_linux.sh only
ENVIRONMENT=""   # the Python that the webui runs on; "" if none was found

read_webui() { # PATH: finds out all of the above, from that version's own files; changes nothing
  WEBUI="$(cd -- "$CALLED_FROM" && CDPATH="" cd -- "$1" 2>/dev/null && pwd)" ||
    fail "'$1' is not a folder that can be opened. Nothing was changed."
  [[ ! -d "$WEBUI/portable_env" && ! -d "$WEBUI/app/portable_env" ]] ||
    fail "$WEBUI is a portable build: it has no PyTorch and runs GGUF models only, which $NAME cannot help.
It is for the full version of the webui. Nothing was changed."
  local file
  for file in server.py modules/shared.py modules/extensions.py; do
    [[ -f "$WEBUI/$file" ]] || fail "$WEBUI is not a text-generation-webui: it has no $file. Nothing was changed.$(
      [[ ! -f "$WEBUI/text-generation-webui/server.py" ]] || printf '\nDid you mean %q?' "$WEBUI/text-generation-webui"
    )"
  done
  find_launcher
  find_flags
  find_extensions
  find_environment
}

find_launcher() {
  local beside
  beside="$(dirname -- "$WEBUI")"
  if [[ -f "$WEBUI/one_click.py" && -f "$WEBUI/start_linux.sh" ]]; then
    LAUNCHER="$WEBUI"
  elif [[ -f "$beside/webui.py" && -f "$beside/start_linux.sh" ]]; then # the one-click installer until September 2023
    LAUNCHER="$beside"
  fi
}

find_flags() {
  if grep -q "CMD_FLAGS\.txt" -- "$WEBUI/modules/shared.py"; then # v3.1 and later
    FLAGS="$WEBUI/user_data/CMD_FLAGS.txt" FLAGS_READ_BY=server
  elif [[ -n "$LAUNCHER" ]] && grep -qs "CMD_FLAGS\.txt" -- "$LAUNCHER/one_click.py" "$LAUNCHER/webui.py"; then
    FLAGS="$LAUNCHER/CMD_FLAGS.txt" FLAGS_READ_BY=launcher
  fi
}

find_extensions() {
  local data="$WEBUI/user_data"
  # v3.7 and later look into user_data/extensions first, and leave it alone when they update themselves.
  if ! grep -Eq "user_data(_dir)?[ /'\"]+extensions" -- "$WEBUI/modules/extensions.py"; then
    EXTENSIONS="$WEBUI/extensions"
    return
  fi
  if [[ -f "$FLAGS" ]]; then
    read_file "$FLAGS"
    find_flag "$REPLY" --user-data-dir
    [[ ${#VALUES[@]} -eq 0 ]] || data="$(cd -- "$WEBUI" && realpath -ms -- "${VALUES[0]}")"
  fi
  [[ -d "$data" ]] || fail "$data is missing: that is where this webui looks for extensions. Nothing was changed."
  EXTENSIONS="$data/extensions"
}

find_environment() {
  local folder
  for folder in "${LAUNCHER:-$WEBUI}/installer_files/env" "$WEBUI/venv" "$WEBUI/.venv"; do
    if "$folder/bin/python" -I -c "" 2>/dev/null; then
      ENVIRONMENT="$folder/bin/python"
      return
    fi
  done
  for folder in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do # An active one need not be the webui's.
    if [[ -n "$folder" ]] && has_modules "$folder/bin/python" torch gradio; then
      ENVIRONMENT="$folder/bin/python"
      return
    fi
  done
}

has_modules() { # PYTHON MODULE...
  "$1" -I -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' \
    "${@:2}" 2>/dev/null
}

# --- the webui: putting the extension in and taking it out -------------------------------------------------------------

use_folder() { # EXTENSIONS: sets where the extension goes in there, and reads what install.sh did there before
  TARGET="$1/$NAME"
  RECORD="$1/.$NAME.installed"
  MADE_FOLDER="$(recorded made_folder)"   # true: the folder of extensions was not there before
  FLAGGED="$(recorded flagged)"           # the CMD_FLAGS.txt that --enable changed
  FLAGS_BEFORE="$(recorded flags_before)" # what it was, in base64; "none": there was no such file
  PACKAGES="$(recorded package)"          # what we installed: one a line, PYTHON<TAB>NAME==VERSION
}

recorded() { # KEY
  [[ ! -f "$RECORD" ]] || sed -n "s/^$1=//p" -- "$RECORD"
}

put_in() { # COPY ENABLE
  use_folder "$EXTENSIONS"
  if [[ "$TARGET" -ef "$ROOT" && ! -L "$TARGET" ]]; then
    fail "This clone itself lies where the webui looks for the extension. Move it elsewhere, then run install.sh there:
  mv $(quoted "$ROOT") ~/$NAME && ~/$NAME/install.sh $(quoted "$WEBUI")"
  fi
  if exists "$TARGET" && ! is_ours "$TARGET"; then
    fail "$TARGET is there already, and install.sh did not make it. Move it away and try again. Nothing was changed."
  fi
  must_be_writable "$EXTENSIONS" "$TARGET" "$RECORD"
  [[ "$2" == false || -z "$FLAGS" ]] || must_be_writable "$FLAGS"

  begin
  make_folder
  place "$1"
  [[ "$2" == false ]] || add_flag
  keep_record
  install_requirements
  keep_record
  finish
  how_to_start
}

take_out() {
  local folder folders=("$EXTENSIONS") found=()
  # A webui older than v3.7 when we were put in may be a newer one today.
  [[ "$EXTENSIONS" == "$WEBUI/extensions" ]] || folders+=("$WEBUI/extensions")
  for folder in "${folders[@]}"; do
    use_folder "$folder"
    if is_ours "$TARGET" || [[ -f "$RECORD" ]]; then
      found+=("$folder")
      must_be_writable "$folder" "$TARGET" "$RECORD"
      [[ ! -f "$FLAGGED" ]] || must_be_writable "$FLAGGED"
    elif exists "$TARGET"; then
      printf '%s stays: install.sh did not make it.\n' "$TARGET"
    fi
  done
  [[ ${#found[@]} -gt 0 ]] || printf 'Nothing to take out: install.sh put nothing into %s.\n' "$WEBUI"

  for folder in "${found[@]}"; do
    use_folder "$folder"
    begin
    remove_placed
    remove_flag
    uninstall_packages
    keep "$RECORD"
    rm -f -- "$RECORD"
    finish
    [[ "$MADE_FOLDER" != true ]] || rmdir --ignore-fail-on-non-empty -- "$folder"
  done
  note_flag_of_others
}

exists() { # PATH: a link that leads nowhere exists, too
  [[ -e "$1" || -L "$1" ]]
}

is_ours() { # PATH: a link to the extension in some clone, or a copy that --copy made
  if [[ -L "$1" ]]; then
    [[ "$(readlink -m -- "$1")" == */extensions/"$NAME" ]]
  else
    [[ -f "$1/$MARKER" ]]
  fi
}

must_be_writable() { # PATH...: asked before anything is changed; of what is not there, its folder
  local path
  for path in "$@"; do
    [[ ! -L "$path" || "$path" != "$TARGET" ]] || continue # The folder it lies in decides, not where it leads.
    while [[ ! -e "$path" ]]; do path="$(dirname -- "$path")"; done
    [[ -r "$path" && -w "$path" && (! -d "$path" || -x "$path") ]] ||
      fail "$path cannot be written to by $(id -un 2>/dev/null || id -u). Nothing was changed."
  done
}

make_folder() {
  [[ ! -d "$EXTENSIONS" ]] || return 0
  MADE_FOLDER=true FOLDER_IS_NEW=true
  mkdir -- "$EXTENSIONS"
}

place() { # COPY
  local new="$EXTENSIONS/.$NAME.new" before=""
  if [[ -L "$TARGET" ]]; then
    if [[ "$1" == false && "$TARGET" -ef "$SOURCE" ]]; then
      printf '%s is linked into %s already.\n' "$NAME" "$EXTENSIONS"
      return
    fi
    before=", in place of a link to $(readlink -- "$TARGET")"
  elif exists "$TARGET"; then
    before=", in place of the copy that was there"
  fi
  rm -rf -- "$new"
  if [[ "$1" == true ]]; then
    mkdir -- "$new"
    (
      cd -- "$SOURCE" || exit
      find . \( -name ".?*" -o -name "__pycache__" \) -prune -o -type f -exec cp --parents -t "$new" -- {} +
    )
    : >"$new/$MARKER"
    printf '%s is copied into %s%s.\n' "$NAME" "$EXTENSIONS" "$before"
  else
    ln -s -- "$SOURCE" "$new"
    printf '%s is linked into %s%s. Keep the clone in %s.\n' "$NAME" "$EXTENSIONS" "$before" "$ROOT"
  fi
  set_aside
  mv -T -- "$new" "$TARGET"
}

remove_placed() {
  is_ours "$TARGET" || return 0
  set_aside
  printf '%s is removed.\n' "$TARGET"
}

keep_record() { # The webui does not see it: it looks for */script.py.
  [[ -n "$MADE_FOLDER$FLAGGED$PACKAGES" ]] || return 0
  keep "$RECORD"
  {
    printf '# What install.sh of %s did here, for its --uninstall.\n' "$NAME"
    printf '%s=%s\n' made_folder "$MADE_FOLDER" flagged "$FLAGGED" flags_before "$FLAGS_BEFORE"
    [[ -z "$PACKAGES" ]] || printf 'package=%s\n' "${PACKAGES//$'\n'/$'\n'package=}"
  } >"$RECORD"
}

# --- the webui: all or nothing -----------------------------------------------------------------------------------------

begin() { # From here to finish, an error or Ctrl-C puts everything back.
  SCRATCH="$(mktemp -d)" # a folder for this run
  KEPT=()                # the files that it changes, with what they were in SCRATCH/1, SCRATCH/2 ...
  ASIDE=""               # where the former TARGET went
  TARGET_IS_NEW=false    # there was none
  FOLDER_IS_NEW=false    # EXTENSIONS was made
  PACKAGES_BEFORE=""     # what was in ENVIRONMENT before pip installed anything
  trap put_back EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
}

finish() {
  trap - EXIT INT TERM HUP
  rm -rf -- "$SCRATCH" "${ASIDE:-$SCRATCH}"
}

keep() { # FILE, before it is changed
  KEPT+=("$1")
  [[ ! -e "$1" ]] || cp -p -- "$1" "$SCRATCH/${#KEPT[@]}"
}

set_aside() { # TARGET, if there is one: gone for good when all went well
  if ! exists "$TARGET"; then
    TARGET_IS_NEW=true
    return
  fi
  rm -rf -- "${TARGET%/*}/.$NAME.before"
  ASIDE="${TARGET%/*}/.$NAME.before"
  mv -T -- "$TARGET" "$ASIDE"
}

put_back() {
  local number
  set +e
  trap '' INT TERM HUP
  [[ -z "$PACKAGES_BEFORE" ]] || take_back_packages
  for ((number = ${#KEPT[@]}; number > 0; number--)); do
    if [[ -e "$SCRATCH/$number" ]]; then
      cp -p -- "$SCRATCH/$number" "${KEPT[number - 1]}"
    else
      rm -f -- "${KEPT[number - 1]}"
    fi
  done
  rm -rf -- "${TARGET%/*}/.$NAME.new"
  if exists "$ASIDE"; then
    rm -rf -- "$TARGET"
    mv -T -- "$ASIDE" "$TARGET"
  elif [[ "$TARGET_IS_NEW" == true ]]; then
    rm -rf -- "$TARGET"
  fi
  [[ "$FOLDER_IS_NEW" == false ]] || rmdir -- "$EXTENSIONS"
  rm -rf -- "$SCRATCH"
  printf 'Stopped halfway; everything was put back as it was.\n' >&2
}

# --- the webui: its CMD_FLAGS.txt --------------------------------------------------------------------------------------

add_flag() {
  if [[ -z "$FLAGS" ]]; then
    printf 'This version of the webui has no CMD_FLAGS.txt, so --enable has nothing to add the flag to.\n'
    return
  fi
  local before=none text
  read_file "$FLAGS"
  text="$REPLY"
  find_flag "$text" --extensions
  if is_among "$NAME" "${VALUES[@]}"; then
    printf '%s names %s already.\n' "$FLAGS" "$NAME"
    return
  fi
  [[ ! -e "$FLAGS" ]] || before="$(base64 -w0 -- "$FLAGS")"
  with_flag "$text"
  keep "$FLAGS"
  printf '%s' "$REPLY" >"$FLAGS"
  FLAGGED="$FLAGS" FLAGS_BEFORE="$before"
  printf '%s has %s among its --extensions now.\n' "$FLAGS" "$NAME"
}

remove_flag() { # that add_flag added: to the byte, if nobody has changed the file since
  local text
  [[ -f "$FLAGGED" || -z "$FLAGGED" ]] || FLAGGED="$FLAGS" # The webui was moved, or updated to where it lies elsewhere.
  [[ -f "$FLAGGED" ]] || return 0
  read_file "$FLAGGED"
  text="$REPLY"
  read_file <([[ "$FLAGS_BEFORE" == none ]] || base64 -d <<<"$FLAGS_BEFORE")
  with_flag "$REPLY"
  keep "$FLAGGED"
  if [[ "$text" != "$REPLY" ]]; then
    without_flag "$text"
    printf '%s' "$REPLY" >"$FLAGGED"
  elif [[ "$FLAGS_BEFORE" == none ]]; then
    rm -- "$FLAGGED"
  else
    base64 -d <<<"$FLAGS_BEFORE" >"$FLAGGED"
  fi
  printf '%s does not name %s any more.\n' "$FLAGGED" "$NAME"
}

note_flag_of_others() {
  read_file "$FLAGS"
  find_flag "$REPLY" --extensions
  ! is_among "$NAME" "${VALUES[@]}" ||
    printf '%s still names %s: install.sh did not put that there.\n' "$FLAGS" "$NAME"
}

read_file() { # FILE: sets REPLY to its text, with all its line ends; to nothing if there is no such file
  REPLY="$(cat -- "$1" 2>/dev/null || true; printf .)"
  REPLY="${REPLY%.}"
}

is_among() { # WORD WORDS...
  local word
  for word in "${@:2}"; do
    [[ "$word" != "$1" ]] || return 0
  done
  return 1
}

# The webui joins the lines of CMD_FLAGS.txt into one command line, without those that start with # and without the
# backslashes at line ends. So a flag's values may go on in the next line, and of two --extensions the last one wins.
find_flag() { # TEXT FLAG: sets VALUES of the last FLAG, FLAG_AT (where it stands) and VALUES_END (where they end)
  local LC_ALL=C text="$1" offset=0 column line word at inside=false
  FLAG_AT=-1 VALUES_END=-1 VALUES=()
  while [[ $offset -lt ${#text} ]]; do
    line="${text:offset}"
    line="${line%%$'\n'*}"
    column=0
    [[ ! "$line" =~ ^[[:space:]]*'#' ]] || column=${#line}
    while [[ "${line:column}" =~ ^[[:space:]]*([^[:space:]]+) ]]; do
      column=$((column + ${#BASH_REMATCH[0]}))
      word="${BASH_REMATCH[1]}"
      at=$((offset + column - ${#word}))
      [[ "${line:column}" == *[![:space:]]* ]] || word="${word%"${word##*[!\\]}"}" # the backslashes at the line's end
      case "$word" in
        "") ;;
        "$2" | "$2="*)
          inside=true FLAG_AT=$at VALUES_END=$((at + ${#word})) VALUES=()
          [[ "$word" == "$2" ]] || VALUES=("$(unquoted "${word#*=}")")
          ;;
        -*) inside=false ;;
        *)
          if [[ "$inside" == true ]]; then
            VALUES+=("$(unquoted "$word")")
            VALUES_END=$((at + ${#word}))
          fi
          ;;
      esac
    done
    offset=$((offset + ${#line} + 1))
  done
}

unquoted() { # WORD
  printf '%s' "${1//[\"\']/}"
}

with_flag() { # TEXT: sets REPLY to it with --extensions sharded_kv
  local LC_ALL=C text="$1" flag newline=$'\n'
  find_flag "$text" --extensions
  if [[ $FLAG_AT -ge 0 ]]; then
    flag="${text:FLAG_AT:VALUES_END-FLAG_AT}"
    # With = argparse takes one value only.
    REPLY="${text:0:FLAG_AT}${flag/#--extensions=/--extensions } $NAME${text:VALUES_END}"
    return
  fi
  [[ "$text" != *$'\r\n'* ]] || newline=$'\r\n'
  [[ -z "$text" || "$text" == *$'\n' ]] || text+="$newline"
  REPLY="$text--extensions $NAME$newline"
}

without_flag() { # TEXT: sets REPLY to it without sharded_kv, and without --extensions if that was all it had
  local LC_ALL=C before flag after
  find_flag "$1" --extensions
  REPLY="$1"
  is_among "$NAME" "${VALUES[@]}" || return 0
  before="${1:0:FLAG_AT}" flag="${1:FLAG_AT:VALUES_END-FLAG_AT}" after="${1:VALUES_END}"
  if [[ ${#VALUES[@]} -gt 1 ]]; then
    [[ ! "$flag" =~ ^(.*)[[:space:]][\"\']?"$NAME"[\"\']?([[:space:]].*)?$ ]] ||
      flag="${BASH_REMATCH[1]}${BASH_REMATCH[2]:-}"
  else
    flag=""
    if [[ -z "$before" || "$before" == *$'\n' ]]; then # The line goes with it, if nothing else is in it.
      [[ ! "$after" =~ ^[[:blank:]]*$'\r'?$'\n' ]] || after="${after:${#BASH_REMATCH[0]}}"
    else
      before="${before%"${before##*[![:blank:]]}"}"
    fi
  fi
  REPLY="$before$flag$after"
}

# --- the webui: its environment ----------------------------------------------------------------------------------------

install_requirements() { # A failure here is only a warning: the extension works without what is in there.
  local requirement package missing=() present=() after
  if [[ -z "$ENVIRONMENT" ]]; then
    printf 'No environment of this webui was found: installer_files/env, venv, .venv, or an active one with %s.\n' \
      "torch and gradio"
    without_requirements python
    return
  fi
  if ! PACKAGES_BEFORE="$(packages_in "$ENVIRONMENT")"; then
    printf '%s has no pip that works.\n' "${ENVIRONMENT%/bin/python}"
    without_requirements "$ENVIRONMENT"
    return
  fi
  while read -r requirement; do
    if is_installed "$requirement"; then
      present+=("$requirement")
    else
      missing+=("$requirement")
    fi
  done < <(sed -E 's/[[:space:]]*#.*//; /^[[:space:]]*$/d' -- "$SOURCE/requirements.txt")
  [[ ${#present[@]} -eq 0 ]] ||
    printf '%s is in %s already, and stays as it is.\n' "${present[*]%%[<>=~!]*}" "${ENVIRONMENT%/bin/python}"
  [[ ${#missing[@]} -gt 0 ]] || return 0
  # All that is there is a constraint: pip may add, and change nothing.
  printf '%s\n' "$PACKAGES_BEFORE" >"$SCRATCH/constraints.txt"
  if ! step "installing ${missing[*]%%[<>=~!]*} into ${ENVIRONMENT%/bin/python}" pip_of "$ENVIRONMENT" install -qq \
    --only-binary :all: --retries 1 --constraint "$SCRATCH/constraints.txt" "${missing[@]}"; then
    without_requirements "$ENVIRONMENT"
    return
  fi
  after="$(packages_in "$ENVIRONMENT")"
  while read -r package; do
    PACKAGES+="${PACKAGES:+$'\n'}$ENVIRONMENT"$'\t'"$package"
  done < <(added "$after")
}

without_requirements() { # PYTHON
  printf '%s works without its requirements; VRAM figures then come from torch alone. To install them:\n' "$NAME"
  printf '  %s -m pip install -r %s\n' "$(quoted "$1")" "$(quoted "$SOURCE/requirements.txt")"
}

pip_of() { # PYTHON ARGUMENT...
  # -I leaves out PYTHONPATH and what is in the user's home, as start_linux.sh does.
  PIP_ROOT_USER_ACTION=ignore "$1" -I -m pip --disable-pip-version-check --no-input "${@:2}" </dev/null
}

packages_in() { # PYTHON: one a line, NAME==VERSION
  pip_of "$1" list --format=freeze 2>/dev/null | LC_ALL=C sort
}

is_installed() { # REQUIREMENT: in any version
  local name="${1%%[!A-Za-z0-9._-]*}"
  grep -Eiq -- "^${name//[-_.]/[-_.]}==" <<<"$PACKAGES_BEFORE" && return
  # Packages of other names have brought the same module: pynvml up to 11, nvidia-ml-py3.
  [[ "$name" == nvidia-ml-py ]] && has_modules "$ENVIRONMENT" pynvml
}

added() { # PACKAGES: those that were not there before
  LC_ALL=C comm -13 <(printf '%s\n' "$PACKAGES_BEFORE") <(printf '%s\n' "$1")
}

take_back_packages() { # that pip had installed when it was stopped
  local package
  for package in $(added "$(packages_in "$ENVIRONMENT")"); do
    pip_of "$ENVIRONMENT" uninstall -qq -y "${package%%==*}" >/dev/null 2>&1
  done
}

uninstall_packages() {
  local python package facts needed_by
  [[ -n "$PACKAGES" ]] || return 0
  while IFS=$'\t' read -r python package; do
    facts="$(pip_of "$python" show "${package%%==*}" 2>/dev/null)" || continue # It is gone already.
    needed_by="$(sed -n 's/^Required-by: *//p' <<<"$facts")"
    if [[ -n "$needed_by" ]]; then
      printf '%s stays in %s: %s needs it.\n' "${package%%==*}" "${python%/bin/python}" "$needed_by"
    elif ! step "uninstalling ${package%%==*} from ${python%/bin/python}" \
      pip_of "$python" uninstall -qq -y "${package%%==*}"; then
      printf 'To try again: %s -m pip uninstall %s\n' "$(quoted "$python")" "${package%%==*}"
    fi
  done <<<"$PACKAGES"
}

# --- the webui: how it is started --------------------------------------------------------------------------------------

how_to_start() {
  local python=python heading="To start the webui with it"
  if [[ -n "$LAUNCHER" && (-z "$ENVIRONMENT" || "$ENVIRONMENT" == "$LAUNCHER"/installer_files/*) ]]; then
    start_by_launcher "$heading"
    heading="or, in an environment of your own"
  fi
  if [[ "$heading" != or* || -z "$ENVIRONMENT" ]]; then
    case "$ENVIRONMENT" in
      "" | "${VIRTUAL_ENV:-}/bin/python" | "${CONDA_PREFIX:-}/bin/python") ;;
      *) python="$(quoted "${ENVIRONMENT#"$WEBUI/"}")" ;;
    esac
    flags_to_give server
    printf '%s:\n  cd %s && %s server.py%s\n' "$heading" "$(quoted "$WEBUI")" "$python" "$REPLY"
  fi
  printf 'To take it out again:\n  ./install.sh %s --uninstall\n' "$(quoted "$WEBUI")"
}

start_by_launcher() { # HEADING
  flags_to_give launcher
  if [[ -n "$REPLY" && "$LAUNCHER" != "$WEBUI" ]]; then # It hands no flags on.
    if [[ -n "$FLAGS" ]]; then
      printf 'Add%s to %s: --enable does that.\n' "$REPLY" "$FLAGS"
    else
      printf 'Add%s to CMD_FLAGS in %s.\n' "$REPLY" "$LAUNCHER/webui.py"
    fi
    REPLY=""
  elif [[ -n "$REPLY" && "$FLAGS_READ_BY" == launcher && ${#VALUES[@]} -gt 0 ]]; then
    # It puts the file's flags behind those given at the start.
    printf 'Add %s to --extensions in %s: --enable does that. A list given at the start is lost.\n' "$NAME" "$FLAGS"
    REPLY=""
  fi
  printf '%s:\n  cd %s && ./start_linux.sh%s\n' "$1" "$(quoted "$LAUNCHER")" "$REPLY"
}

flags_to_give() { # TO, server or launcher: sets REPLY to what it has to be given, beside what CMD_FLAGS.txt says
  VALUES=()
  if [[ "$FLAGS_READ_BY" == server || "$FLAGS_READ_BY" == "$1" ]]; then
    read_file "$FLAGS"
    find_flag "$REPLY" --extensions
  fi
  REPLY=""
  # A list given at the start replaces the one in the file, so it names those, too.
  is_among "$NAME" "${VALUES[@]}" || REPLY=" --extensions ${VALUES[*]}${VALUES[*]:+ }$NAME"
}

quoted() { # WORD: as a shell takes it
  printf '%q' "$1"
}
