"Packaging: everything is said in settings.ini, which nbdev reads as well."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
config = ConfigParser(delimiters=['='])
if not config.read(HERE/'settings.ini', encoding='utf-8'): raise SystemExit(f'setup.py needs settings.ini beside it, in {HERE}')
cfg = config['DEFAULT']
pythons = [f'3.{minor}' for minor in range(int(cfg['min_python'].split('.')[1]), int(cfg['below_python'].split('.')[1]))]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], license='Apache-2.0', license_files=['LICENSE'],
    long_description=(HERE/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Education',
                 *(f'Programming Language :: Python :: {p}' for p in pythons)],
    packages=[cfg['lib_path']],
    python_requires=f">={cfg['min_python']},<{cfg['below_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev', 'bench', 'browser')},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    zip_safe=False,
)
