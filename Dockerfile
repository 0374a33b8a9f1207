# syntax=docker/dockerfile:1
# Both commands, linked statically, in an image of their own: no shell, no library.
#
#   docker build -t fewbit .
#   docker run --rm -p 127.0.0.1:8080:8080 -v "$PWD/models:/models:ro" fewbit serve -m /models/mixtral-Q4_K_M.gguf --host 0.0.0.0
#   docker run --rm -it -v "$PWD/models:/models" fewbit chat -m /models/mixtral-Q4_K_M.gguf --session /models/notes.session
#   docker run --rm -v "$PWD/models:/models" --entrypoint /usr/local/bin/fewbit-convert fewbit /models/checkpoint /models/out.gguf --type Q4_K_M

FROM rust:1.95-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends musl-tools \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /fewbit
COPY . .
# The platform's own musl target: x86_64 or aarch64.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/fewbit/target \
    target="$(uname -m)-unknown-linux-musl" \
    && rustup target add "$target" \
    && cargo build --locked --release --target "$target" --package fewbit --package fewbit-convert \
    && install -D -t /out/usr/local/bin "target/$target/release/fewbit" "target/$target/release/fewbit-convert"
# A folder for what a conversation or a conversion writes, for whoever runs it.
RUN install -d -m 1777 /out/models /out/tmp

FROM scratch
COPY --from=build /out /
ENV HOME=/tmp PATH=/usr/local/bin
USER 1000:1000
WORKDIR /models
EXPOSE 8080
ENTRYPOINT ["/usr/local/bin/fewbit"]
CMD ["--help"]
