"What every benchmark needs: the machine and the versions in words, and a table in a file."
import os, platform, re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

results = Path(__file__).parent/'results'


def machine()->str:
    "Processor, cores, GPU and versions, as they stand under a table."
    import torch
    cpu = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        found = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
        cpu = found.group(1) if found else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    def v(name):
        try: return f'{name} {version(name)}'
        except PackageNotFoundError: return f'no {name}'
    return (f'{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {gpu}; Python {platform.python_version()}, '
            f'{", ".join(map(v, ("torch", "torchvision", "numpy", "pillow")))}; {date.today()}')


def table(header, rows)->str:
    "A Markdown table."
    lines = [header, ['---']*len(header), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, l)) + ' |' for l in lines)


def save(name, text)->None:
    "Write `text` and the machine's description to `results/NAME.md`, and print them."
    text = f'{text}\n\n{machine()}\n'
    results.mkdir(exist_ok=True)
    (results/f'{name}.md').write_text(text)
    print(text)
