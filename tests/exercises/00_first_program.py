"Answers to the exercises of 00_first_program: other right ones, and wrong ones with a word of the sentence that must reject them."
COUNT = 'def n_wrong(learn):\n    preds, labels = learn.get_preds()\n    return '
GRAY = 'def to_gray(img): return '
ANSWERS = {
    'check_shape': dict(right=['scores_shape = [32, 10]', 'scores_shape = torch.Size([32, 10])'],
        wrong=[('scores_shape = (10, 32)', 'wrong order'), ('scores_shape = (1, 10)', 'number of images'), ('scores_shape = (32, 3)', 'one score a class'), ('scores_shape = 10', 'give two numbers'),
               ('scores_shape = (32, 3, 48, 48)', 'give two numbers'), ('scores_shape = (32, 1)', 'one score a class')]),
    'check_n_wrong': dict(right=[COUNT + 'sum(int(p.argmax()) != int(l) for p, l in zip(preds, labels))', 'def n_wrong(learn): return round((1-learn.validate()["accuracy"])*len(learn.data.valid_ds))'],
        wrong=[(COUNT + '(preds.argmax(1) == labels).sum()', 'count those'), (COUNT + '(preds.argmax(1) != labels).float().mean()', 'fraction'),
               (COUNT + 'preds.argmax(1) != labels', 'one number'), (COUNT + '(preds.max(1).values != labels).sum()', 'position of the highest'),
               (COUNT + '(preds.argmin(1) != labels).sum()', 'position of the highest'), (COUNT + 'len(labels)', 'position of the highest'),
               ('def n_wrong(learn): print(78)', 'one number')]),
    'check_to_gray': dict(right=['from PIL import ImageOps\n' + GRAY + 'ImageOps.grayscale(img).convert("RGB")', 'import numpy as np\n' + GRAY + 'Image.fromarray(np.asarray(img).mean(2, keepdims=True).repeat(3, 2).astype(np.uint8))'],
        wrong=[(GRAY + 'img.convert("L")', 'mode L'), (GRAY + 'img', 'equal in each pixel'), ('import numpy as np\n' + GRAY + 'np.asarray(img.convert("L").convert("RGB"))', 'should return a PIL image'),
               (GRAY + 'img.convert("L").convert("RGB").resize((2, 2))', 'size should stay'), (GRAY + 'Image.new("RGB", img.size, (128, 128, 128))', 'one gray everywhere'),
               ('def to_gray(img): img.convert("L").convert("RGB")', 'returns a NoneType')]),
}
