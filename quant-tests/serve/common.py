"""A `fewbit serve` in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path


class Server:
    """Runs `fewbit serve` on any free port; `url` leads to it."""

    def __init__(self, binary, model, *arguments):
        command = [binary, "serve", "-m", model, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"listening on (\S+)", line):
                self.url = found[1]
                return
            print(line, end="", file=sys.stderr)
        sys.exit(f"{' '.join(map(str, command))}: the server did not start")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)

    def own_bytes(self):
        """Memory of the process's own: not the mapped model."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024

    def open_files(self):
        """Files and sockets that are open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))
