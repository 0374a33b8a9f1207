#!/usr/bin/env bash
# The tests of kernels and of the forward pass on aarch64, from any other Linux machine: built once with
# a cross compiler, run by qemu as three processors, one for each level of NEON kernels.
#
#   quant-tests/arm/run.sh
#
# Needs gcc for aarch64, qemu-user, and Rust's standard library for aarch64: the rustup target, or the
# library's source, from which cargo builds it: rustup's component rust-src or Debian's package of the
# compiler's version. As root on Debian it installs what is missing. All else lies in target/ and downloads/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
target=aarch64-unknown-linux-gnu
packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)

tools_are_there() {
    command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null \
        && [ -e /usr/aarch64-linux-gnu/lib/libc.so.6 ]
}

if ! tools_are_there && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet
    apt-get install --quiet --yes --no-install-recommends "${packages[@]}"
fi
if ! tools_are_there; then
    echo "$0: needs a cross compiler and qemu (Debian: apt-get install ${packages[*]})" >&2
    exit 1
fi

# Puts the source of the standard library, from Debian's package for the version $1, at $2. The
# machine's own lists of packages and its installed packages are left alone.
fetch_library() {
    local version=$1 to=$2 work options
    work=$(mktemp -d "$to.XXXXXX")
    # shellcheck disable=SC2064 # this folder, whatever the variable says later
    trap "rm -rf '$work'" EXIT
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/library"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie-backports main" \
        >"$work/sources.list"
    options=(-o "Dir::Etc::sourcelist=$PWD/$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$PWD/$work/lists" -o "Dir::Cache=$PWD/$work/cache" -o APT::Sandbox::User=)
    apt-get "${options[@]}" --quiet update
    (cd "$work" && apt-get "${options[@]}" --quiet download "rust-src=$version*")
    dpkg-deb --fsys-tarfile "$work"/rust-src_*.deb \
        | tar -x -C "$work/library" --strip-components=5 --wildcards './usr/src/rustc-*/library'
    mv "$work/library" "$to"
}

build=(--target "$target" --target-dir target/arm)
sysroot=$(rustc --print sysroot)
if [ ! -d "$sysroot/lib/rustlib/$target/lib" ]; then
    # Stable cargo, but for the building of the standard library.
    build+=(-Zbuild-std=std,panic_unwind,test)
    export RUSTC_BOOTSTRAP=1
    if [ ! -d "$sysroot/lib/rustlib/src/rust/library" ]; then
        version=$(rustc --version | sed -E 's/^rustc ([0-9.]+).*/\1/')
        library=downloads/rust-library-$version
        mkdir -p downloads
        if [ ! -d "$library" ] && ! { command -v apt-get && command -v dpkg-deb; } >/dev/null; then
            echo "$0: needs the standard library for aarch64 (rustup target add $target)" >&2
            exit 1
        fi
        [ -d "$library" ] || fetch_library "$version" "$library"
        # Where cargo looks for that source, other than in the toolchain's own folder.
        export __CARGO_TESTS_ONLY_SRC_ROOT=$PWD/$library
    fi
fi

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64
export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
export RUSTFLAGS="${RUSTFLAGS:-} -Dwarnings"

# Always of the same two packages, so that nothing is built twice.
cargo_test() {
    ${CARGO:-cargo} test "${build[@]}" --package fewbit --package quant-tests "$@"
}

cargo_test --lib --test kernels --test floats --test attention --test forward --test company --no-run
for processor in max:neon-i8mm neoverse-n1:neon-dotprod cortex-a72:neon; do
    export QEMU_CPU=${processor%:*} FEWBIT_TEST_WIDEST=${processor#*:}
    printf '\naarch64, %s: %s\n' "$QEMU_CPU" "$FEWBIT_TEST_WIDEST"
    cargo_test --lib -- kernels::
    cargo_test --test kernels
    cargo_test --test forward -- f32_logits threads_do_not_change_a_bit a_prompt_and_single
    if [ "$QEMU_CPU" = max ]; then
        # Floats are worked on alike at every level; and emulated, these take minutes.
        cargo_test --test floats --test attention
        cargo_test --test company -- sessions_of_a_batch
    fi
done
