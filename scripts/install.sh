# Sourced by ./run and ./test: `install runtime|dev` brings .venv to exactly the locked packages.
# A stamp remembers what was installed, so that a second call does nothing.

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3 python3.12 python3.13 python3.14 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed; none is on PATH (PYTHON=/path/to/python names one)" >&2
    return 1
}

install() {
    local set=$1 stamp=".venv/.installed-$1" wanted python
    local files=(-r requirements/build.txt -r "requirements/$set.txt")
    wanted=$(cat pyproject.toml requirements/build.txt "requirements/$set.txt" | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    python=$(find_python)
    echo "installing the locked packages ($set) into .venv" >&2
    if command -v uv >/dev/null; then
        [ -x .venv/bin/python ] || uv venv --quiet --python "$(command -v "$python")" .venv
        uv pip install --quiet --python .venv/bin/python --require-hashes "${files[@]}"
        uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
    else
        [ -x .venv/bin/pip ] || "$python" -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check --require-hashes "${files[@]}"
        .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    fi
    if [ "$set" = dev ]; then # dev holds all of runtime
        cat pyproject.toml requirements/build.txt requirements/runtime.txt | cksum >.venv/.installed-runtime
    fi
    echo "$wanted" >"$stamp"
}
