"""Run a command as on a processor without AVX-512, on one that has it.

    python -m benchmarks.smaller_processor python -m benchmarks.speed --rows step forward
    python -m benchmarks.smaller_processor python -m pytest tests/model

Switches of libraries are not enough: XLA's products are YNNPACK's, which asks the processor itself
what it can do. So in a copy of jaxlib every CPUID instruction becomes a breakpoint, whose handler
executes it and takes AVX-512 and AMX out of the answer. PyTorch, oneDNN, MKL and NumPy have
switches, which are set as well. Linux on x86-64 with `cc` and `objdump`; the copy is in the
temporary folder and is made once for a version.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version

HANDLER = r"""
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <ucontext.h>

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint32_t leaf = r[REG_RAX], part = r[REG_RCX], a = leaf, b = 0, c = part, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (leaf == 7 && part == 0) {
        b &= ~0xdc230000u;  /* F, DQ, IFMA, PF, ER, CD, BW, VL */
        c &= ~0x00005842u;  /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
        d &= ~0x03c0010cu;  /* 4VNNIW, 4FMAPS, VP2INTERSECT, AMX, FP16 */
    }
    if (leaf == 7 && part == 1) a &= ~0x30u;  /* AVX-VNNI, BF16 */
    r[REG_RAX] = a; r[REG_RBX] = b; r[REG_RCX] = c; r[REG_RDX] = d;
    r[REG_RIP] += 1;  /* beyond the rest of the instruction, which is a no-op now */
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {0};
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
    sigaction(SIGTRAP, &action, 0);
}
"""
SWITCHES = {
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NPY_DISABLE_CPU_FEATURES": (
        "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
    ),
}
CPUID, BREAKPOINT = b"\x0f\xa2", b"\xcc\x90"


def patch(path: pathlib.Path) -> int:
    """Put a breakpoint in place of each CPUID instruction of a library, and return how many."""
    table = subprocess.run(["readelf", "-SW", path], capture_output=True, text=True, check=True)
    pattern = r"^\s*\[\s*\d+\]\s+\S+\s+PROGBITS\s+(\w+)\s+(\w+)\s+(\w+)"
    sections = [[int(x, 16) for x in found] for found in re.findall(pattern, table.stdout, re.M)]
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    count = 0
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as lines,
        open(path, "r+b") as file,
    ):
        for line in lines.stdout or ():
            if not re.search(r":\s+cpuid\b", line):
                continue
            address = int(line.partition(":")[0], 16)
            start, offset, _ = next(s for s in sections if s[0] <= address < s[0] + s[2])
            file.seek(address - start + offset)
            if file.read(2) != CPUID:
                raise ValueError(f"{path}: no CPUID at {address:x}")
            file.seek(address - start + offset)
            file.write(BREAKPOINT)
            count += 1
    return count


def make_copy() -> pathlib.Path:
    """Return the folder with the copy of jaxlib and the handler's library."""
    import jaxlib

    folder = pathlib.Path(tempfile.gettempdir(), f"jaxlib-{version('jaxlib')}-without-avx512")
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as scratch:
        new = pathlib.Path(scratch, "new")
        shutil.copytree(pathlib.Path(jaxlib.__file__).parent, new / "jaxlib")
        source = new / "handler.c"
        source.write_text(HANDLER)
        subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", source, "-o", new / "handler.so"], check=True
        )
        libraries = sorted((new / "jaxlib").glob("*.so"), key=lambda path: path.stat().st_size)
        print(f"{libraries[-1].name}: {patch(libraries[-1])} instructions", file=sys.stderr)
        new.rename(folder)
    return folder


def main():
    """Run the command of the arguments."""
    if not sys.argv[1:]:
        sys.exit(__doc__)
    folder = make_copy()
    paths = [str(folder), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {SWITCHES['XLA_FLAGS']}".strip()
    environment = os.environ | SWITCHES | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LD_PRELOAD": str(folder / "handler.so"),
    }  # fmt: skip
    command = [sys.executable if x == "python" else x for x in sys.argv[1:]]
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
