"""Lists what is public on purpose: `from dl2lib.all import *` brings these names and no other. A name of the engine is exported with
`#| exporti`: other modules import it by name, and a user does not meet it."""
import importlib

import pytest
from repo_tools import front_door, python

PUBLIC = {
    'state': '''set_seed preserve_rng preserve_mode''',
    'core': '''test_eq test_near listify setify uniqueify compose ListContainer Table camel2snake noop default_device
        to_device set_seed''',
    'safefile': '''''',
    'scoreboard': '''record_score plot_scoreboard''',
    'files': '''image_extensions get_files''',
    'images': '''ImageFileError open_image make_rgb open_bytes jpeg_decoder''',
    'datasets': '''shape_names imagenette_names data_dir shape_image shapes shapes_tensors imagenette''',
    'schedules': '''annealer sched_lin sched_cos sched_no sched_exp combine_scheds cos_1cycle_anneal create_phases''',
    'callbacks': '''events CancelStepException CancelBatchException CancelEpochException CancelTrainException Callback TrainEvalCallback accuracy
        AvgStats AvgStatsCallback Recorder ParamScheduler LR_Find CudaCallback BatchTransformXCallback ChannelsLastCallback''',
    'runner': '''TrainBundle Runner get_runner get_batch''',
    'hooks': '''Hook append_stat children Hooks append_stats find_modules is_lin_layer is_act_layer ActivationStats''',
    'convnet': '''GeneralRelu conv_layer ConvLayer prev_pow_2 Lambda flatten view_tfm get_cnn_layers get_cnn_model init_cnn get_learn_run
        model_summary''',
    'lsuv': '''lsuv_init lsuv_module''',
    'resnet': '''ResBlock get_resnet_layers get_resnet_model''',
    'splits': '''Splitter IndexSplitter NameSplitter ColumnSplitter ColumnLabeler StratifiedSplitter''',
    'loader': '''get_dls''',
    'datablock': '''norm_imagenette ItemList ImageList Transform MakeRGB ResizeFixed to_byte_tensor to_float_tensor
        grandparent_splitter random_splitter split_by_func SplitData parent_labeler re_labeler Processor
        UnknownLabelError CategoryProcessor MultiCategoryProcessor LabeledData label_by_func Dataset DataBunch
        databunchify show_image show_batch ByteToFloat normalize_chan normalize_to image_extensions get_files
        ImageFileError open_image make_rgb Splitter IndexSplitter NameSplitter ColumnSplitter StratifiedSplitter
        ColumnLabeler get_dls''',
    'check': '''explain CheckError check''',
    'datacache': '''CacheError cached''',
    'foreach': '''''',
    'groups': '''''',
    'optimizers': '''sgd_opt sgd_mom_opt sgd_step weight_decay l2_reg get_defaults maybe_update Stat AverageGrad debias lin_comb momentum_step
        AverageSqrGrad StepCount adam_step lamb_step Optimizer StatefulOptimizer adam_opt lamb_opt''',
    'zoo': '''OPTIMIZERS nesterov_step LionGrad rms_step MeanGrad centred_rms_step SumSqrGrad DeltaGrad MaxSqrAvg amsgrad_step MaxGrad
        adamax_step NesterovProduct nadam_step radam_step lars_grad muon_step RpropSizes SlowWeights lookahead_step lookahead
        optimizers_table to_torch from_torch decay_groups layer_ratios RatioRecorder''',
    'learner': '''param_getter Learner get_learner''',
    'progress': '''ProgressCallback''',
    'practice': '''BatchTransformYCallback GradientClip GradientAccumulation MixedPrecision EarlyStopping KeepBest CSVLog NonFiniteError
        TerminateOnNaN CompileCallback suggest_lr lr_find trace''',
    'checkpoints': '''StateFileError save_checkpoint unfinished load_checkpoint CheckpointCallback''',
    'inference': '''confusion_matrix load_learner''',
    'augmentation': '''np_to_float PilTransform uniform PilRandomFlip PilRandomDihedral process_sz default_crop_size GeneralCrop CenterCrop
        RandomResizedCrop find_coeffs warp PilTiltRandomCrop affine_batch rotation_matrix rotate_batch warp_batch''',
    'batch_warp': '''flip_matrix dihedral_matrix shear_matrix zoom_matrix crop_matrix tilt_matrix move_points BatchOp GeometryOp RandomFlip
        RandomDihedral RandomRotate RandomShear RandomZoom RandomTilt RandomCrop brightness_matrix contrast_matrix saturation_matrix
        normalization_matrix ColourOp RandomBrightness RandomContrast RandomSaturation RandomErase AugmentBatch show_augmented
        show_extremes AugmentCallback MixUp CutMix''',
    'train': '''Settings train''',
}
ENGINE = '''main predict_main Plan kernel_of GroupsAndStates Entry TrainLoop CallbackHost SeededDataLoader collate write_state read_state
    preserve_order check_event fit_or_go_on make_data triangle_taps'''.split()


def test_the_list_has_the_order_of_the_modules(): assert list(PUBLIC) == front_door()

@pytest.mark.parametrize('name', PUBLIC)
def test_a_module_exports_what_is_public_on_purpose(name):
    has, listed = set(importlib.import_module(f'dl2lib.{name}').__all__), set(PUBLIC[name].split())
    assert has == listed, f'public and not listed: {has - listed}; listed and not public: {listed - has}'

def test_the_front_door_brings_them_all_and_nothing_else(tmp_path):
    names = {n for names in PUBLIC.values() for n in names.split()}
    brought = set(python('names = {}; exec("from dl2lib.all import *", names); print(*names)', tmp_path).split()) - {'__builtins__'}
    assert brought == names | {'tensor'}

def test_no_name_of_the_engine_is_public():
    front = importlib.import_module('dl2lib.all')
    assert [n for n in ENGINE if hasattr(front, n)] == []
    modules = [importlib.import_module(f'dl2lib.{m}') for m in front_door()]
    assert [n for n in ENGINE if not any(hasattr(m, n) for m in modules)] == [], 'names that are gone: take them off the list'
