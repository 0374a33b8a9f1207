#!/usr/bin/env bash
# The texts of the bed's ladder besides the test text: one to calibrate on, one to choose settings on.
#
#   quant-tests/ladder/texts.sh FOLDER
#
# From Debian's archive (apt-get download; nothing is installed; needs groff): FOLDER/calibration.txt is manuals and fortunes,
# FOLDER/choice.txt the Debian FAQ and the Developer's Reference. Lines that hold a run of ten words of the test
# text (fixtures/text/en.txt) or, in the one, of the other, are left out.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/packages"
cd "$1/packages"
for package in fortunes fortunes-min manpages debian-faq developers-reference; do
    [ -d $package ] || { apt-get download -qq -o APT::Sandbox::User=root $package >&2; dpkg-deb -x ${package}_*.deb $package; }
done
python3 - "$here/../fixtures/text/en.txt" .. <<'PYTHON'
import glob, gzip, html, os, random, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

test, folder = sys.argv[1:]

def runs(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 10]) for i in range(len(words) - 9)}

def manual(path):
    """Paragraphs of a manual, one a line."""
    command = ["groff", "-man", "-Tutf8", "-P-cbou", "-rLL=2000n", "-rHY=0"]
    out = subprocess.run(command, input=gzip.open(path).read(), capture_output=True).stdout.decode()
    lines = (re.sub(r"\s+", " ", line).strip() for line in out.splitlines())
    return [line for line in lines if len(line) > 80]

def page(path):
    opener = gzip.open if path.endswith("gz") else open
    text = opener(path, "rt", encoding="utf-8").read()
    paragraphs = re.findall(r"<p>(.*?)</p>", text, re.S)
    lines = (re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", "", p))).strip() for p in paragraphs)
    return [line for line in lines if len(line) > 80]

def shuffled(lines):
    """Passages of a dozen lines in an order by chance, so that any beginning is a mixture."""
    passages = [lines[i : i + 12] for i in range(0, len(lines), 12)]
    random.Random(1).shuffle(passages)
    return [line for passage in passages for line in passage]

def write(name, lines, *others):
    known = set().union(*others)
    seen, kept = set(), []
    for line in lines:
        if line in seen or runs(line) & known:
            continue
        seen.add(line)
        kept.append(line)
    text = "\n".join(kept) + "\n"
    # A run across two lines breaks the rule as well: none may be left.
    left = runs(text) & known
    if left:
        sys.exit(f"{name}: still shares {len(left)} runs, such as {next(iter(left))}")
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)
    print(f"{name}: {len(text)} bytes")
    return runs(text)

held_out = runs(open(test, encoding="utf-8").read())
paths = sorted(glob.glob("manpages/usr/share/man/man[578]/*.gz"))
with ThreadPoolExecutor(2) as pool:
    manuals = [line for lines in pool.map(manual, paths) for line in lines]
cookies = []
for path in sorted(p for p in glob.glob("fortunes*/usr/share/games/fortunes/*") if "." not in os.path.basename(p)):
    for cookie in open(path, encoding="utf-8").read().split("\n%\n"):
        cookies.append(re.sub(r"\s+", " ", cookie).strip())
cookies = [cookie for cookie in cookies if len(cookie) > 80]
calibration = write("calibration.txt", shuffled(manuals + cookies), held_out)
documents = [
    [line for path in sorted(glob.glob(f"{pattern}/*.html*")) for line in page(path)]
    for pattern in ("debian-faq/usr/share/doc/debian/FAQ", "developers-reference/usr/share/developers-reference")
]
write("choice.txt", shuffled(sum(documents, [])), held_out, calibration)
PYTHON
