#!/usr/bin/env python3
"""Speed of fewbit and of its rivals as results.csv, and results.svg drawn from it.

    quant-tests/bench/report.py measure [--ik LLAMA_BENCH] [--threads 2] FILE.gguf...
    quant-tests/bench/report.py plot

`measure` runs `fewbit bench --against ggml` (llama.cpp in turns with fewbit, in one process) and, where --ik
names the llama-bench of an ik_llama.cpp build, that before and after it; the median of its runs with the better
flags counts. A row of the CSV is a test of a file: rows of the same machine, file, threads and test are replaced.
--quiet is a command to run the others under, say one that takes a lock. Python's standard library is enough.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
CSV, SVG = os.path.join(HERE, "results.csv"), os.path.join(HERE, "results.svg")
COLUMNS = (
    "machine", "read_gb_s", "int8_gop_s", "file", "type", "threads", "test", "tok_s", "gb_s", "gop_s", "share_of_limit",
    "llama_cpp_tok_s", "llama_cpp_rows", "ratio_llama_cpp", "ik_tok_s", "ik_flags", "ratio_ik",
)
KEY = ("machine", "file", "threads", "test")
# Mixture of experts fused and flash attention, ik_llama.cpp's best on a CPU; rows repacked at load or not.
IK_FLAGS = {"in place": ["-rtr", "0"], "repacked": ["-rtr", "1"]}


def machine():
    """The CPU, and how many of its cores this process may use."""
    fields = {}
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            lines = (line.split(":", 1) for line in info if ":" in line)
            fields = {key.strip(): value.strip() for key, value in lines}
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return f"{name}, {len(os.sched_getaffinity(0))} CPUs"


def ik_bench(args, path, threads):
    """Tokens a second of each test under each set of flags, of one run."""
    rates = {}
    for name, flags in IK_FLAGS.items():
        command = [args.ik, "-m", path, "-t", str(threads), "-fmoe", "1", "-fa", "1", *flags]
        command += ["-p", args.prompt, "-n", str(args.generate), "-r", "1", "-o", "json"]
        output = subprocess.run([*args.quiet.split(), *command], check=True, capture_output=True, text=True).stdout
        # Its log may come before the array.
        for row in json.loads(output[output.index("[\n"):]):
            test = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
            rates.setdefault(test, {}).setdefault(name, []).append(float(row["avg_ts"]))
    return rates


def merge(into, rates):
    for test, ways in rates.items():
        for name, values in ways.items():
            into.setdefault(test, {}).setdefault(name, []).extend(values)


def bench(args, path, threads):
    """The CSV's rows for a file."""
    ik = {}
    for turn in range(2 * args.ik_turns):
        if turn == args.ik_turns:
            command = [args.fewbit, "bench", "-m", path, "-t", str(threads), "--json", "-p", args.prompt]
            command += ["-n", str(args.generate), "-r", str(args.repetitions)]
            if not args.alone:
                command += ["--against", "ggml"]
            output = subprocess.run([*args.quiet.split(), *command], check=True, stdout=subprocess.PIPE, text=True)
            ours = json.loads(output.stdout)
        if args.ik:
            merge(ik, ik_bench(args, path, threads))
    against = {row["test"]: row for row in ours.get("against", {}).get("results", [])}
    for result in ours["results"]:
        row = {
            "machine": machine(),
            "read_gb_s": f"{ours['limits']['read_gb_s']:.1f}",
            "int8_gop_s": f"{ours['limits']['int8_gop_s']:.0f}",
            "file": os.path.basename(path).removesuffix(".gguf"),
            "type": ours["type"],
            "threads": str(threads),
            "test": result["test"],
            "tok_s": f"{result['tok_s']:.2f}",
            "gb_s": f"{result['gb_s']:.1f}" if result["gb_s"] else "",
            "gop_s": f"{result['gop_s']:.0f}" if result["gop_s"] else "",
            "share_of_limit": f"{result['share_of_limit']:.3f}",
        }
        if rival := against.get(result["test"]):
            row["llama_cpp_tok_s"] = f"{rival['tok_s']:.2f}"
            row["llama_cpp_rows"] = "repacked" if rival["repacked"] else "in place"
            row["ratio_llama_cpp"] = f"{rival['ratio']:.2f}"
        if ways := ik.get(result["test"]):
            rate, name = max((statistics.median(rates), name) for name, rates in ways.items())
            row["ik_tok_s"], row["ik_flags"] = f"{rate:.2f}", name
            row["ratio_ik"] = f"{result['tok_s'] / rate:.2f}"
        yield row


def read_csv():
    if not os.path.exists(CSV):
        return []
    with open(CSV, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(rows):
    with open(CSV, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def measure(args):
    for path in args.files:
        for threads in args.threads.split(","):
            new = list(bench(args, path, int(threads)))
            keys = {tuple(row[column] for column in KEY) for row in new}
            old = [row for row in read_csv() if tuple(row[column] for column in KEY) not in keys]
            write_csv(old + new)
            for row in new:
                print(*(row.get(column, "") for column in COLUMNS[3:]), sep="\t")


# The plot: a section for each machine, in it a panel for each number of threads and test, a group of bars for each file.
COLOURS = {"tok_s": "#1b6ca8", "llama_cpp_tok_s": "#e0a030", "ik_tok_s": "#8a9a5b"}
NAMES = {"tok_s": "fewbit", "llama_cpp_tok_s": "llama.cpp", "ik_tok_s": "ik_llama.cpp"}
WIDTH, HEIGHT, LEFT, TOP, BAR = 620, 250, 60, 46, 22


def limit(row):
    """Tokens a second at which the test would meet the machine's limit."""
    return float(row["tok_s"]) / float(row["share_of_limit"])


def panel(title, rows, y):
    """A panel's SVG elements, the top at `y`."""
    bottom, height = y + TOP + HEIGHT - 60, HEIGHT - 60
    top = 1.08 * max(max(limit(row), *(float(row[name] or 0) for name in NAMES)) for row in rows)
    scale = height / top
    step = (WIDTH - LEFT - 10) / len(rows)
    yield f'<text x="{LEFT}" y="{y + 20}" font-weight="bold">{title}</text>'
    magnitude = 10 ** (len(str(int(top))) - 1)
    tick = next(t for t in (magnitude / 5, magnitude / 2, magnitude, 2 * magnitude) if top / t <= 6)
    for i in range(int(top / tick) + 1):
        line = bottom - i * tick * scale
        yield f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{line:.1f}" y2="{line:.1f}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 6}" y="{line + 4:.1f}" text-anchor="end">{i * tick:g}</text>'
    for group, row in enumerate(rows):
        left = LEFT + group * step + (step - 3 * BAR) / 2
        for bar, name in enumerate(NAMES):
            value = float(row[name] or 0)
            if value:
                x, h = left + bar * BAR, value * scale
                yield f'<rect x="{x:.1f}" y="{bottom - h:.1f}" width="{BAR - 3}" height="{h:.1f}" fill="{COLOURS[name]}"/>'
                yield f'<text x="{x + BAR / 2 - 1.5:.1f}" y="{bottom - h - 3:.1f}" text-anchor="middle" font-size="9">{value:.{0 if value >= 100 else 1}f}</text>'
        line = bottom - limit(row) * scale
        yield f'<line x1="{left - 6:.1f}" x2="{left + 3 * BAR + 3:.1f}" y1="{line:.1f}" y2="{line:.1f}" stroke="#c0392b" stroke-width="2"/>'
        yield f'<text x="{left + 1.5 * BAR:.1f}" y="{bottom + 16}" text-anchor="middle">{row["type"]}</text>'


def plot(_):
    machines = {}
    for row in read_csv():
        model = row["file"].replace("-" + row["type"], "")
        what = "prompt of " if row["test"].startswith("pp") else "generating "
        title = f'{model}, {what}{row["test"][2:]} tokens, {row["threads"]} thread{"s" * (row["threads"] != "1")}: tokens/s'
        machines.setdefault(row["machine"], {}).setdefault(title, []).append(row)
    y, body = 40, []
    for machine, panels in machines.items():
        body.append(f'<text x="{LEFT}" y="{y + 30}" font-size="14">{machine}</text>')
        y += 40
        for title, group in panels.items():
            body += panel(title, group, y)
            y += HEIGHT + 20
    legend, x = [], LEFT
    for name, label in NAMES.items():
        legend.append(f'<rect x="{x}" y="14" width="12" height="12" fill="{COLOURS[name]}"/><text x="{x + 17}" y="24">{label}</text>')
        x += 110
    legend.append(f'<line x1="{x}" x2="{x + 16}" y1="20" y2="20" stroke="#c0392b" stroke-width="2"/>')
    legend.append(f'<text x="{x + 21}" y="24">limit of the machine (memory or int8)</text>')
    with open(SVG, "w") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="11">\n')
        file.write('<rect width="100%" height="100%" fill="white"/>\n')
        file.write("\n".join(legend + body) + "\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure")
    command.add_argument("files", nargs="+", metavar="FILE.gguf")
    command.add_argument("--fewbit", default="target/native/release/fewbit", help="built with the feature ggml")
    command.add_argument("--ik", help="llama-bench of a native build of ik_llama.cpp")
    command.add_argument("--ik-turns", type=int, default=1, help="its runs before and after ours")
    command.add_argument("--alone", action="store_true", help="without llama.cpp")
    command.add_argument("--threads", default="2", help="separated by commas")
    command.add_argument("--prompt", default="32,128,512")
    command.add_argument("--generate", default=64, type=int)
    command.add_argument("--repetitions", default=3, type=int)
    command.add_argument("--quiet", default="", help="a command to run the others under")
    commands.add_parser("plot")
    args = parser.parse_args()
    {"measure": measure, "plot": plot}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
