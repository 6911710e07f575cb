"Answers to the exercises of 08_datablock: other right ones, and wrong ones with a word of the sentence that must reject them."
def group(body): return f'def group_splitter(fn, p_valid=0.2): return {body}'

def standardize(mean='statistics.mean(items)', std='statistics.pstdev(items)', proc='(item-self.mean)/self.std', back='item*self.std + self.mean',
                setup='setup(self, items)', more=''):
    return (f'class Standardize(Processor):\n    def {setup}: self.mean, self.std = {mean}, {std}\n    def proc1(self, item): return {proc}\n'
            f'    def deproc1(self, item): return {back}\n{more}')

ANSWERS = {
    'check_groups': dict(
        right=[group("random_splitter(Path(fn).name.split('_')[0], p_valid)"), group("random_splitter(re_labeler(fn, r'(.+)_'), p_valid=p_valid, seed=7)")],
        wrong=[(group('random_splitter(fn, p_valid)'), 'some dogs are on both sides'), (group('random_splitter(parent_labeler(fn), p_valid)'), 'same side'),
               (group("random_splitter(re_labeler(fn, r'^([^_]+)_'))"), 'pass it on'), (group('random.random() < p_valid'), 'both sides'), (group('bool(hash(re_labeler(fn, r"(.+)_")) % 2)'), 'in every process'),
               ('sides = {}\ndef group_splitter(fn, p_valid=0.2): return sides.setdefault(re_labeler(fn, r"(.+)_"), random.random() < p_valid)', 'draws random numbers'),
               (group('"valid" if random_splitter(re_labeler(fn, r"(.+)_"), p_valid) else "train"'), 'True or False'),
               (group("random_splitter(re_labeler(fn, r'(\\d+)_'), p_valid)"), 'two dogs'), (group("random_splitter(re_labeler(fn, r'_(\\d+)'), p_valid)"), 'both sides')]),
    'check_order': dict(
        right=["order = 'make_rgb crop ResizeFixed to_byte_tensor'.split()"],
        wrong=[("order = ['crop', 'make_rgb', 'ResizeFixed', 'to_byte_tensor']", 'crop comes first'), ("order = ['make_rgb', 'ResizeFixed', 'to_byte_tensor', 'crop']", 'crop comes last'),
               ("order = ['make_rgb', 'ResizeFixed', 'crop', 'to_byte_tensor']", 'at index 1'), ("order = ['to_byte_tensor', 'crop', 'ResizeFixed', 'make_rgb']", 'largest of the three'),
               ("order = ['ResizeFixed', 'crop', 'make_rgb', 'to_byte_tensor']", 'sort the others'), ("order = ['make_rgb', 'crop']", 'four names')]),
    'check_standardize': dict(
        right=[standardize(proc='item/self.std - self.mean/self.std'), standardize(mean='sum(items)/len(items)', std='statistics.pvariance(items)**.5')],
        wrong=[(standardize(mean='0.'), 'subtract the mean'), (standardize(std='statistics.stdev(items)'), 'pstdev'), (standardize(std='1.'), 'standard deviation'),
               (standardize(back='item'), 'deproc1'), (standardize().split('    def deproc1')[0], 'deproc1 is missing'), (standardize(proc='item-self.mean/self.std'), 'in parentheses'), (standardize(back='(item+self.mean)*self.std'), 'deproc1'), (standardize(std='statistics.pvariance(items)'), 'standard deviation'),
               (standardize(more='    def __call__(self, items):\n        self.setup(items)\n        return [self.proc1(o) for o in items]'), 'its own mean')]),
}
