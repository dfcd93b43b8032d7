# Sourced by the other launchers: makes .venv in the repository, installs longtrain into it in place, puts it on PATH.
#
# Nothing is installed when .venv already matches pyproject.toml and constraints.txt. Two variables choose otherwise:
#   PYTHON=python3.12                the interpreter to build .venv with (3.11 or newer; default: python3)
#   LONGTRAIN_TORCH_INDEX=URL|pip    where PyTorch comes from. Unset: on Linux without an NVIDIA GPU a CPU build
#                                    (one that your pip configuration offers, else PyTorch's CPU index), otherwise
#                                    pip's default, which on Linux is a CUDA build. `pip`: always pip's default.
#                                    URL: another index of https://pytorch.org/get-started, for another CUDA version.
# To change the build later: delete .venv, set the variable, run again.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=$repository/.venv
torch_requirement=$(grep '^torch==' "$repository/launchers/constraints.txt")

refuse() {
    echo "$1" >&2
    exit 2
}

# pip, quietly: its words go to a log, whose end is shown if it fails. The installed packages come from wheels. Python
# compiles what is imported; to compile all of it here would take a minute.
install() {
    "$environment/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile "$@" >>"$environment/install.log" 2>&1
}

install_torch() {
    case ${LONGTRAIN_TORCH_INDEX:-} in
    pip) install "$torch_requirement" ;;
    ?*) install "$torch_requirement" --index-url "$LONGTRAIN_TORCH_INDEX" ;;
    *)
        if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
            install "$torch_requirement+cpu" ||
                install "$torch_requirement" --index-url https://download.pytorch.org/whl/cpu
        else
            install "$torch_requirement"
        fi
        ;;
    esac
}

make_environment() {
    local python=${PYTHON:-python3} wanted started=$SECONDS
    command -v "$python" >/dev/null || refuse "There is no '$python'; longtrain needs Python 3.11 or newer (set PYTHON=...)."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        refuse "$("$python" --version) is too old: longtrain needs 3.11 or newer (set PYTHON=python3.11 or such)."
    # The path is part of the stamp because a virtual environment cannot be moved.
    wanted=$(cat "$repository/pyproject.toml" "$repository/launchers/constraints.txt" - <<<"$repository" | cksum)
    if [ "$(cat "$environment/longtrain.stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing longtrain and its dependencies into $environment (about two minutes the first time) ..."
        "$python" -m venv "$environment" || refuse "'$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv."
        : >"$environment/install.log"
        if ! install_torch || ! install -e "$repository[dev]" -c "$repository/launchers/constraints.txt"; then
            tail -n 5 "$environment/install.log" >&2
            refuse "The installation failed; the whole log is $environment/install.log."
        fi
        echo "$wanted" >"$environment/longtrain.stamp"
        echo "Installed in $((SECONDS - started)) s."
    fi
}

make_environment
# Where it is set, what the installation leaves to the first import would be compiled by every process again: a first
# step of two ranks then comes after 25 seconds rather than 10 (measured on two cores).
unset PYTHONDONTWRITEBYTECODE
export VIRTUAL_ENV=$environment PATH=$environment/bin:$PATH
