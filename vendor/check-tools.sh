#!/bin/sh
# Says in one line what is missing to build ggml and its bindings. Cargo cannot: a dependency's build
# script fails first, pages long.

missing=""
command -v cmake >/dev/null || missing="$missing cmake"
command -v c++ >/dev/null || missing="$missing g++"
if [ -z "$LIBCLANG_PATH" ] && ! command -v llvm-config >/dev/null; then
    found=$(ls /usr/lib/llvm-*/lib/libclang*.so* /usr/lib/*/libclang-[0-9]*.so* /usr/lib*/libclang.so* \
        /usr/local/lib/libclang.so* /Library/Developer/CommandLineTools/usr/lib/libclang.dylib \
        2>/dev/null | grep -v libclang-cpp | head -n 1)
    [ -n "$found" ] || missing="$missing libclang-dev"
fi
if [ -n "$missing" ]; then
    echo "Building ggml needs (Debian packages):$missing" >&2
    echo "  apt-get install$missing" >&2
    exit 1
fi
