"""Every notebook in real JupyterLab in a real browser: opened, all cells run, looked at, saved.

    make browser                            all notebooks; NB="00_core 09c_progress" chooses
    python tests/browser.py [NAME ...]      the same, in an environment that has dl2lib's `[dev,browser]`

A copy of each notebook is opened in headless Chromium, Run All Cells is chosen from the menu, and when the last cell is done the notebook is
saved. Then these must hold: no cell has an error; each code cell has an execution count; every picture and every table that the run gave is
in the page, as many as the repository's notebook shows; and no formula is in red, or left as its source. Screenshots stay in out/browser/NAME.png (a long notebook
has more: NAME-2.png). Takes some ten minutes, so it is no part of `make test`. The server listens on a free local port with a token of its
own, and keeps its settings and its copies in a temporary folder."""
import argparse, json, os, re, secrets, shutil, socket, subprocess, sys, tempfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from repo_tools import NOTEBOOKS, ROOT, directives, environment, read_nb, source

NO_CHROMIUM = ('No Chromium was found. On Debian or Ubuntu:\n    apt-get update && apt-get install -y chromium\n'
               'A browser that is somewhere else is named by the environment variable CHROMIUM.')
NO_PLAYWRIGHT = 'Playwright, which drives the browser, is not installed:\n    .venv/bin/pip install -c constraints.txt -e ".[dev,browser]"'
NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
WIDTH, HEIGHT, TALLEST = 1400, 1000, 12_000 # pixels: of the window, and of one screenshot
SETTINGS = { # of JupyterLab, so that all cells are in the page, and nothing asks the network or the reader
    'notebook-extension/tracker': dict(windowingMode='none', autoStartDefaultKernel=True),
    'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False, doNotDisturbMode=True)}


def find_chromium(): # path, or None
    return os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, NAMES)), None)

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def wait(until, seconds, what, step=.2): # until `until()` gives something; returns it
    end = time.time()+seconds
    while time.time() < end:
        res = until()
        if res: return res
        time.sleep(step)
    raise TimeoutError(f'{what}: not within {seconds} s')


class Server:
    "A JupyterLab of its own, in a temporary folder."
    def __init__(self, tmp, jupyter): # folder; command
        self.root, self.port, self.token, self.log = tmp/'notebooks', free_port(), secrets.token_hex(16), tmp/'server.log'
        self.root.mkdir()
        for name, values in SETTINGS.items():
            f = tmp/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_text(json.dumps(values))
        dirs = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_RUNTIME_DIR='runtime', JUPYTER_DATA_DIR='data', IPYTHONDIR='ipython',
                    JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces')
        env = environment(ROOT, **{k: str(tmp/v) for k, v in dirs.items()}, JUPYTER_PREFER_ENV_PATH='1')
        args = [jupyter, '--no-browser', '--allow-root', f'--ServerApp.port={self.port}', '--ServerApp.port_retries=0', '--ServerApp.ip=127.0.0.1',
                f'--IdentityProvider.token={self.token}', f'--ServerApp.root_dir={self.root}', '--LabApp.news_url=None', '--ServerApp.open_browser=False']
        self.proc = subprocess.Popen(list(map(str, args)), cwd=self.root, env=env, stdin=subprocess.DEVNULL, stdout=self.log.open('w'), stderr=subprocess.STDOUT)
        wait(self.is_up, 120, 'JupyterLab did not answer')

    def is_up(self):
        if self.proc.poll() is not None: raise RuntimeError(f'JupyterLab ended at once:\n{self.log.read_text()[-3000:]}')
        try: return self.api('status')
        except OSError: return None

    def url(self, path, query=''): return f'http://127.0.0.1:{self.port}/{path}?token={self.token}{query}'

    def api(self, path, method='GET'): # what the server's API says
        with urllib.request.urlopen(urllib.request.Request(self.url(f'api/{path}'), method=method), timeout=30) as r:
            text = r.read()
        return json.loads(text) if text else None

    def session(self, name): # of a notebook, when its kernel is idle
        return next((s for s in self.api('sessions') if s['path'] == name and s['kernel']['execution_state'] == 'idle'), None)

    def stop(self):
        self.proc.terminate()
        try: self.proc.wait(15)
        except subprocess.TimeoutExpired: self.proc.kill(); self.proc.wait()


@contextmanager
def browser_page(chromium): # a window of a browser, and what its pages complain of
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-dev-shm-usage'])
        page, said = browser.new_page(viewport=dict(width=WIDTH, height=HEIGHT)), []
        page.on('pageerror', lambda e: said.append(str(e)))
        try: yield page, said
        finally: browser.close()


# In the page

PROMPTS = '() => [...document.querySelectorAll(".jp-Notebook .jp-CodeCell .jp-InputPrompt")].map(o => o.textContent)'
SEEN = '''() => { const all = q => [...document.querySelectorAll('.jp-Notebook ' + q)];
  return {pictures: all('.jp-OutputArea-output img').filter(o => o.naturalWidth > 0).length,
          tables: all('.jp-OutputArea-output table').filter(o => o.offsetHeight > 0).length,
          epochs: all('.jp-OutputArea-output table').filter(o => /^\\s*epoch/.test(o.textContent)).length,
          formulas: all('mjx-container').length,
          red: all('mjx-merror, mjx-mtext[style*="color: red"]').map(o => o.dataset.mjxError || o.closest('mjx-container').querySelector('mjx-assistive-mml').textContent),
          unset: all('.jp-MarkdownOutput p').filter(o => { const c = o.cloneNode(true); c.querySelectorAll('code, mjx-container').forEach(x => x.remove());
            return /\\$\\$|\\\\[a-z]+\\{/i.test(c.textContent) }).length} }'''
SCROLLER = "document.querySelector('.jp-NotebookPanel .jp-WindowedPanel-outer')"

def run_all(page, server, name, seconds):
    "Open a notebook and run it: through the menu, as a reader does."
    page.goto(server.url(f'lab/tree/{quote(name)}', '&reset'), timeout=90_000)
    page.wait_for_selector('.jp-Notebook .jp-CodeCell', timeout=90_000)
    session = wait(lambda: server.session(name), 120, 'the kernel did not start')
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    wait(lambda: any(re.search(r'\[[*\d]', t) for t in page.evaluate(PROMPTS)), 60, 'no cell began to run')
    wait(lambda: not any('*' in t for t in page.evaluate(PROMPTS)) and server.session(name), seconds, 'the cells did not come to an end', step=.5)
    page.wait_for_timeout(1500) # for the last picture to be drawn
    return session

def save(page, path):
    "Save, and wait until it is on disk. -> the notebook."
    before = path.stat().st_mtime_ns
    page.get_by_role('menuitem', name='File', exact=True).click()
    page.get_by_role('menuitem', name=re.compile('^Save Notebook(?! As)')).click()
    wait(lambda: path.stat().st_mtime_ns != before, 60, 'the notebook was not saved')
    page.wait_for_timeout(500)
    return read_nb(path)

def screenshots(page, out, name):
    "The whole notebook, in pictures of at most `TALLEST` pixels."
    page.keyboard.press('Control+b') # the list of files gives its room to the notebook
    page.set_viewport_size(dict(width=WIDTH, height=HEIGHT))
    page.wait_for_timeout(500)
    full = page.evaluate(f'{SCROLLER}.scrollHeight')
    height = min(full+150, TALLEST)
    page.set_viewport_size(dict(width=WIDTH, height=height))
    page.wait_for_timeout(1000)
    step = page.evaluate(f'{SCROLLER}.clientHeight')
    for i in range(-(-full//step)):
        page.evaluate(f'{SCROLLER}.scrollTop = {i*step}')
        page.wait_for_timeout(300)
        page.screenshot(path=out/f'{name}{f"-{i+1}" if i else ""}.png')


# What must hold

def outputs(nb): # of all code cells: kind to how many
    datas = [o.get('data', {}) for c in nb['cells'] if c['cell_type'] == 'code' for o in c['outputs']]
    html = [''.join(d['text/html']) for d in datas if 'text/html' in d]
    return dict(pictures=sum(any(k.startswith('image/') for k in d) for d in datas), tables=sum(h.count('<table') for h in html),
                epochs=sum(len(re.findall(r'<table[^>]*>\s*(?:<thead>)?\s*<tr[^>]*>\s*<th[^>]*>\s*epoch', h)) for h in html))

def faults(nb, kept, seen): # the notebook as saved; the one in the repository; what was in the page -> texts
    res = []
    code = [c for c in nb['cells'] if c['cell_type'] == 'code' and source(c).strip()]
    for c in code:
        first = next((l for l in source(c).splitlines() if l.strip() and not l.startswith('#|')), '')
        for o in c['outputs']:
            if o['output_type'] == 'error': res.append(f'{o["ename"]}: {o["evalue"][:300]} (cell that begins: {first[:80]})')
        if c['execution_count'] is None and 'eval' not in directives(c): res.append(f'never run: the cell that begins: {first[:80]}')
    gave, had = outputs(nb), outputs(kept)
    for k in gave:
        if gave[k] < had[k]: res.append(f'{k}: {gave[k]} came out, the notebook in the repository has {had[k]}')
        if seen[k] < gave[k]: res.append(f'{k}: {gave[k]} came out, {seen[k]} are in the page')
    text = '\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'markdown')
    if '$' in text and not seen['formulas']: res.append('no formula was set')
    for t in seen['red']: res.append(f'a formula is in red: {t[:200]}')
    if seen['unset']: res.append(f'{seen["unset"]} paragraphs show the source of a formula')
    return res

def look_at(page, server, path, out, seconds): # one notebook -> faults, what was seen
    name = path.name
    shutil.copy(path, server.root/name)
    session = run_all(page, server, name, seconds)
    seen = page.evaluate(SEEN)
    nb = save(page, server.root/name)
    screenshots(page, out, path.stem)
    server.api(f'sessions/{session["id"]}', 'DELETE')
    return faults(nb, read_nb(path), seen), seen


def chosen(names): # of notebooks, with or without `nbs/` and `.ipynb`
    names = [Path(n).stem for n in names]
    unknown = [n for n in names if n not in {p.stem for p in NOTEBOOKS}]
    if unknown: sys.exit(f'no such notebook: {", ".join(unknown)}; there are {", ".join(p.stem for p in NOTEBOOKS)}')
    return [p for p in NOTEBOOKS if p.stem in names] if names else NOTEBOOKS

def main(argv=None):
    p = argparse.ArgumentParser(description='Run the notebooks in JupyterLab in a browser.')
    p.add_argument('names', nargs='*', help='notebooks, such as 00_core; none: all'); p.add_argument('--out', default=ROOT/'out'/'browser', type=Path)
    p.add_argument('--jupyter', default=Path(sys.executable).parent/'jupyter-lab', help='the command, where it is not beside this Python')
    p.add_argument('--seconds', type=int, default=900, help='for the cells of one notebook, at most')
    args = p.parse_args(argv)
    paths, chromium = chosen(args.names), find_chromium()
    if chromium is None: sys.exit(NO_CHROMIUM)
    try: import playwright # noqa: F401
    except ImportError: sys.exit(NO_PLAYWRIGHT)
    args.out.mkdir(parents=True, exist_ok=True)
    bad = 0
    with tempfile.TemporaryDirectory() as tmp:
        server = Server(Path(tmp), args.jupyter)
        try:
            for path in paths:
                start, said = time.time(), []
                try:
                    with browser_page(chromium) as (page, said): wrong, seen = look_at(page, server, path, args.out, args.seconds)
                except Exception as e: wrong, seen = [f'{type(e).__name__}: {str(e)[:500]}'], {}
                bad += bool(wrong)
                what = ', '.join(f'{n} {k}' for k, n in seen.items() if k not in ('red', 'unset'))
                print(f'{path.stem:18} {"FAILED" if wrong else "ok":7} {time.time()-start:4.0f} s  {what}', flush=True)
                for w in wrong: print(f'    {w}')
                for s in said: print(f'    the page said: {s[:200]}')
        finally: server.stop()
    print(f'{len(paths)-bad} of {len(paths)} notebooks ran; screenshots are in {args.out}')
    return int(bad > 0)


if __name__ == '__main__': sys.exit(main())
