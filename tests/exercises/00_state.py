"Answers to the exercise of engine/00_state: another right one, and wrong ones with a word of the sentence that must reject them."
ANSWERS = {
    'check_seeded': dict(
        right=['@contextmanager\ndef seeded(seed):\n    before = rng_state()\n    set_seed(seed)\n    try: yield\n    finally: set_rng_state(before)'],
        wrong=[('@contextmanager\ndef seeded(seed):\n    set_seed(seed)\n    yield', 'random, numpy, torch'),
               ('@contextmanager\ndef seeded(seed):\n    with preserve_rng():\n        torch.manual_seed(seed)\n        yield', 'it does not for random, numpy'),
               ('@contextmanager\ndef seeded(seed):\n    with preserve_rng(): yield', 'go on as before'),
               ('@contextmanager\ndef seeded(seed):\n    with preserve_rng():\n        set_seed(0)\n        yield', 'ignores the seed'),
               ('@contextmanager\ndef seeded(seed):\n    before = torch.get_rng_state()\n    set_seed(seed)\n    yield\n    torch.set_rng_state(before)', 'random, numpy'),
               ('@contextmanager\ndef seeded(seed):\n    before = rng_state()\n    set_seed(seed)\n    yield\n    set_rng_state(before)', 'after an error'),
               ('def seeded(seed):\n    with preserve_rng():\n        set_seed(seed)\n        yield', 'is @contextmanager above the def'),
               ('@contextmanager\ndef seeded():\n    with preserve_rng(): yield', 'should take a seed')]),
}
