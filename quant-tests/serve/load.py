"""Many clients at once: nothing may be lost, leaked or written differently than alone.

    load.py FEWBIT MODEL [--clients 200] [--seconds 120]

Most clients stream greedy answers and compare them with the same request made alone; some read slowly, some break
off, some send nonsense. Prints one JSON object.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
import urllib.request

import openai

from common import Server

SUBJECTS = ["the sea", "a bridge", "bread", "the moon", "a clock", "winter", "a letter", "the river", "salt", "a garden"]
WISHES = ["Tell me about {}.", "Write a short poem about {}.", "What is {} made of?", "Explain {} to a child."]
PROMPTS = [wish.format(subject) for wish in WISHES for subject in SUBJECTS]
TOKENS = 32


def ask(prompt):
    return dict(
        model="any", messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=TOKENS, stream=True
    )


async def read(client, prompt, pause=0.0):
    parts, finish = [], None
    async for chunk in await client.chat.completions.create(**ask(prompt)):
        parts.append(chunk.choices[0].delta.content or "")
        finish = finish or chunk.choices[0].finish_reason
        if pause:
            await asyncio.sleep(pause)
    if not finish:
        raise AssertionError("a stream ended before its text")
    return "".join(parts)


async def break_off(client, prompt, chance):
    stream = await client.chat.completions.create(**ask(prompt))
    async for _ in stream:
        if chance.random() < 0.2:
            break
    await stream.close()


async def nonsense(url, chance):
    host, port = re.match(r"http://([^:]+):(\d+)", url).groups()
    reader, writer = await asyncio.open_connection(host, int(port))
    body = bytes(chance.randrange(256) for _ in range(50))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {50 + 50 * chance.randrange(2)}\r\n\r\n"
    writer.write(chance.choice([head.encode() + body, body, head.encode()[: chance.randrange(40)]]))
    await writer.drain()
    await asyncio.sleep(chance.random())
    writer.close()


async def client_loop(index, client, url, alone, counts, until):
    chance = random.Random(index)
    while time.monotonic() < until:
        prompt = chance.choice(PROMPTS)
        kind = {7: "slow", 13: "cut", 17: "nonsense"}.get(index % 20, "plain")
        try:
            if kind == "cut":
                await break_off(client, prompt, chance)
            elif kind == "nonsense":
                await nonsense(url, chance)
            else:
                text = await read(client, prompt, 0.05 if kind == "slow" else 0.0)
                if text != alone[prompt]:
                    counts["different"] += 1
                    print(f"{prompt!r}: {text!r} instead of {alone[prompt]!r}", file=sys.stderr)
            counts[kind] += 1
        except openai.RateLimitError:
            counts["refused"] += 1
            await asyncio.sleep(1)
        except Exception as error:
            counts["failed"] += 1
            print(f"{kind}: {type(error).__name__}: {error}", file=sys.stderr)
            await asyncio.sleep(0.1)


def figure(server, name):
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])


async def watch(server, samples, until):
    while time.monotonic() < until:
        samples.append((server.own_bytes(), server.open_files()))
        await asyncio.sleep(2)


async def run(server, clients, seconds):
    # The package opens up to 1000 connections by itself.
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)
    alone = {prompt: await read(client, prompt) for prompt in PROMPTS}
    counts = dict.fromkeys(["plain", "slow", "cut", "nonsense", "refused", "failed", "different"], 0)
    samples = []
    before = figure(server, "fewbit_generated_tokens_total")
    begun = time.monotonic()
    until = begun + seconds
    loops = [client_loop(i, client, server.url, alone, counts, until) for i in range(clients)]
    await asyncio.gather(watch(server, samples, until), *loops)
    took = time.monotonic() - begun
    tokens = figure(server, "fewbit_generated_tokens_total") - before
    await client.close()
    # All that was asked for is over, and every connection closed.
    for _ in range(100):
        if figure(server, "fewbit_active") == figure(server, "fewbit_waiting") == 0:
            break
        await asyncio.sleep(0.1)
    third = len(samples) // 3
    memory = [size for size, _ in samples]
    return counts | {
        "clients": clients,
        "seconds": round(took, 1),
        "tokens_a_second": round(tokens / took, 1),
        "active_at_the_end": figure(server, "fewbit_active"),
        "open_files_at_most": max(files for _, files in samples),
        "open_files_at_the_end": server.open_files(),
        "own_mb_after_a_third": round(memory[third] / 1e6, 1),
        "own_mb_at_the_end": round(server.own_bytes() / 1e6, 1),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    with Server(arguments.binary, arguments.model, "--slots", "16", "-c", "512") as server:
        result = asyncio.run(run(server, arguments.clients, arguments.seconds))
    print(json.dumps(result))
    grown = result["own_mb_at_the_end"] - result["own_mb_after_a_third"]
    wrong = [name for name in ("failed", "different", "active_at_the_end") if result[name]]
    if grown > 0.05 * result["own_mb_after_a_third"] + 5:
        wrong.append(f"{grown:.0f} MB grown")
    if not (result["plain"] and result["slow"] and result["cut"]):
        wrong.append("some kinds of clients got nothing done")
    if wrong:
        sys.exit("load: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
