"What every benchmark needs: arms that take turns, ratios with their range, the machine and the versions in words, a table in a file."
import gc, os, platform, re, statistics, time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

results = Path(__file__).parent/'results'


def interleaved(arms:dict, rounds:int, warmup=1, turns=1)->dict:
    """Seconds of each arm in each round, as the sum of its turns. The arms take turns, each time another first, so that whatever else the machine does
    falls on all alike. An arm is a function of the round's number; it may return seconds that it has measured itself."""
    names, times = list(arms), {k: [] for k in arms}
    for r in range(-warmup, rounds):
        taken = dict.fromkeys(names, 0.)
        for t in range(turns):
            shift = (r*turns+t) % len(names)
            for k in names[shift:]+names[:shift]:
                gc.collect() # what another arm has left behind is not this one's to clear
                start = time.perf_counter()
                own = arms[k](r)
                taken[k] += time.perf_counter()-start if own is None else own
        if r >= 0:
            for k, seconds in taken.items(): times[k].append(seconds)
    return times


def ratios(times:dict, a, b)->list:
    "Of arm `a` to arm `b`, within each round."
    return [x/y for x, y in zip(times[a], times[b])]


def spread(values, fmt='.2f', scale=1)->str:
    "Median (range)."
    vs = [scale*v for v in values]
    return f'{statistics.median(vs):{fmt}} ({min(vs):{fmt}} to {max(vs):{fmt}})'


def machine(*more)->str: # names of further packages
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
            f'{", ".join(map(v, ("torch", "torchvision", "numpy", "pillow", *more)))}; {date.today()}')


def table(header, rows)->str:
    "A Markdown table."
    lines = [header, ['---']*len(header), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, l)) + ' |' for l in lines)


def save(name, text, packages=())->None: # further packages whose versions matter
    "Write `text` and the machine's description to `results/NAME.md`, and print them."
    text = f'{text}\n\n{machine(*packages)}\n'
    results.mkdir(exist_ok=True)
    (results/f'{name}.md').write_text(text)
    print(text)
