"""What else knows timm's models: transformers, segmentation_models_pytorch, onnxruntime."""

import pytest
import timm
import torch

from timm_ham import TimmHamError
from timm_ham.models.loading import load_classifier, load_model
from timm_ham.publishing.golden import golden_images, golden_logits
from timm_ham.publishing.onnx import export_onnx
from timm_ham.training.batches import normalize

from .conftest import BUNDLED


def test_transformers():
    """Its own loading of the folder, by parameter names, and its own preprocessing and labels."""
    transformers = pytest.importorskip('transformers')
    from PIL import Image

    model = transformers.AutoModelForImageClassification.from_pretrained(BUNDLED).eval()
    ours = load_classifier(str(BUNDLED))
    pixels = golden_images(32, 32)
    cfg = ours.model.pretrained_cfg
    with torch.inference_mode():
        logits = model(normalize(pixels, cfg['mean'], cfg['std']).contiguous()).logits
    assert torch.equal(logits, golden_logits(ours.model))

    image = Image.fromarray(pixels[0].numpy()).resize((50, 40))
    results = transformers.pipeline('image-classification', model=str(BUNDLED))(image)
    wanted = ours.model(ours.transform(image)[None]).softmax(1)[0]
    assert len(results) == 5
    for result in results:
        assert result['score'] == pytest.approx(wanted[ours.label_names.index(result['label'])].item(), abs=1e-5)


@pytest.mark.parametrize('name', ['resnet34_ham', 'wide_resnet18_2_ham'])
def test_segmentation_models(name):
    """The networks for 96x96 images halve four times: encoder_depth is 4. The encoder's maps are timm's own."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    segmenter = smp.Unet(
        f'tu-{name}', encoder_weights=None, encoder_depth=4, decoder_channels=(64, 32, 16, 8), classes=3
    )
    images = torch.randn(1, 3, 96, 96)
    assert segmenter.eval()(images).shape == (1, 3, 96, 96)
    features = timm.create_model(name, features_only=True).eval()
    features.load_state_dict(segmenter.encoder.model.state_dict())
    for ours, theirs in zip(features(images), segmenter.encoder(images), strict=True):
        assert torch.equal(ours, theirs)


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model, file = load_model('resnet20_ham'), tmp_path / 'model.onnx'
    assert export_onnx(model, file) < 1e-4
    cfg = model.pretrained_cfg
    images = normalize(golden_images(32, 32), cfg['mean'], cfg['std']).contiguous()
    (logits,) = onnxruntime.InferenceSession(file).run(['logits'], {'images': images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), golden_logits(model.eval()), atol=1e-4, rtol=1e-4)
    with pytest.raises(TimmHamError, match=r'model\.onnx exists: name another file by --output'):
        export_onnx(model, file)
    with pytest.raises(TimmHamError, match=r'there is no folder .*nowhere'):
        export_onnx(model, tmp_path / 'nowhere' / 'model.onnx')


def test_onnx_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_ham.publishing.onnx.find_spec', lambda name: None if name == 'onnxscript' else name)
    with pytest.raises(TimmHamError, match=r"ONNX needs onnxscript: pip install 'timm_ham\[onnx\]'"):
        export_onnx(load_model('resnet20_ham'), tmp_path / 'model.onnx')
