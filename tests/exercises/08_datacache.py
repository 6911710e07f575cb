"Answers to the exercises of engine/08_datacache: other right ones, and wrong ones with a word of the sentence that must reject them."

def table(key='self.content', result='torch.from_numpy(np.frombuffer(self.content, np.uint8)[x.numpy()])', after='pass'): # code, with one part replaced
    return (f'class Table(Transform):\n    _order = 25\n    def __init__(self, fn):\n        self.f = open(fn, "rb")\n        self.content = self.f.read()\n'
            f'        self.cache_key = {key}\n        {after}\n    def __call__(self, x): return {result}')

def covered(tfms='[*tfms, Flip(order)]', result='c.names', before='pass'):
    return f'def covered_at(order):\n    {before}\n    c = cached(ImageList(il.items, tfms={tfms}), "cache")\n    return {result}'

ANSWERS = {
    'check_megabytes': dict(right=['megabytes = 6.144', 'megabytes = 500*3*64*64/2**20'],
        wrong=[('megabytes = 500*49_152/2/1e6', 'a quarter'), ('megabytes = 500*64*64/1e6', 'three channels'), ('megabytes = 4*6.144', 'one byte'),
               ('megabytes = 400*3*64*64/1e6', 'validation images'), ('megabytes = 6_144_000', 'in bytes'), ('megabytes = 49_152/4/1e6', 'one image'),
               ('megabytes = sum(fn.stat().st_size for fn in il.items)/1e6', 'JPEGs'), ('megabytes = 100', 'height and width')]),
    'check_table': dict(right=[table('self.content.hex()', 'torch.tensor(list(self.content), dtype=torch.uint8)[x.long()]'),
                               'import hashlib\n' + table('hashlib.sha256(self.content).hexdigest()')],
        wrong=[(table('None'), 'no cache_key'), (table('str(fn)'), 'under another name'), (table('id(self)'), 'under another name'),
               (table('str(fn) + self.content.hex()'), 'under another name'), (table('len(self.content)'), 'did not change'),
               (table('self.f'), 'BufferedReader'), (table('time.time_ns()'), 'another key'), (table(after='self.f.close()'), 'keep its file open'),
               (table(after='self.f.seek(0)', result='torch.from_numpy(np.frombuffer(self.f.read(), np.uint8)[x.numpy()])'), 'read to its end'),
               (table(result='255-x'), 'at place k'), (table(result='None'), 'returns nothing'),
               (table(result='np.frombuffer(self.content, np.uint8)[x.numpy()]'), 'uint8 tensor')]),
    'check_covered_at': dict(right=[covered(tfms='sorted([Flip(order), *tfms], key=lambda f: getattr(f, "_order", 0))')],
        wrong=[(covered(result='[type(f).__name__ for f in c.tfms]'), 'left to do'), (covered(result='c.tfms'), 'list of names'),
               (covered(result='c'), 'list of names'), (covered(tfms='[*tfms, Flip(25)]'), 'get its `order`'), (covered(tfms='tfms'), 'get its `order`'),
               (covered(tfms='tfms', before='tfms.append(Flip(order))'), 'make a new list'), (covered(result='c.names[1:]'), 'decoder is covered'),
               (covered(tfms='[*tfms, lambda x: x]'), 'get its `order`'), (covered(result='c.names + ["to_byte_tensor"]'), 'for order 5')]),
}
