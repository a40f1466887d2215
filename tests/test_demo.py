"""The page, in a real browser where there is one, and as a Space."""

import ast
import io
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import RepoCard
from PIL import Image

pytest.importorskip('gradio')
pytest.importorskip('pytorch_grad_cam')

import timm_ham.inspection.demo as demo

SPACE = Path(__file__).resolve().parents[1] / 'hub' / 'space'


@pytest.fixture(scope='module')
def page():
    sync_api = pytest.importorskip('playwright.sync_api')
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        browsers = [shutil.which(name) for name in ('chromium', 'chromium-browser', 'google-chrome')]
        browser = next((path for path in (*browsers, own) if path and Path(path).exists()), None)
        if browser is None:
            pytest.skip('no Chromium: apt-get install chromium, or python -m playwright install chromium')
        served = demo.launch_demo(prevent_thread_lock=True, quiet=True)
        try:
            chromium = playwright.chromium.launch(executable_path=browser, args=['--no-sandbox'])
            opened = chromium.new_page(viewport={'width': 1200, 'height': 900})
            opened.set_default_timeout(60_000)
            opened.goto(served.local_url)
            yield opened
            chromium.close()
        finally:
            served.close()


def upload(page, file):
    page.set_input_files('input[type=file]', file)


def test_an_image_gives_a_result(page):
    assert re.match(r'http://127\.0\.0\.1:', page.url)
    upload(page, SPACE / 'examples' / 'horse.png')
    page.get_by_alt_text('The image, and where each model looks').wait_for()
    maps = page.get_by_alt_text('Spatial maps, channel attention, alpha and beta')
    maps.wait_for()
    assert page.get_by_test_id('label-output-value').inner_text() == 'horse'
    for picture in (page.get_by_alt_text('The image, and where each model looks'), maps):
        shot = Image.open(io.BytesIO(picture.screenshot())).convert('RGB')
        assert min(shot.size) > 100 and len(shot.getcolors(1 << 24)) > 1000


def test_an_example_gives_a_result(page):
    page.reload()
    page.locator('.gallery-item').first.click()
    page.get_by_test_id('label-output-value').get_by_text('airplane').wait_for()


def test_what_is_no_image_gets_a_message(page, tmp_path):
    (tmp_path / 'x.png').write_text('hello')
    page.reload()
    upload(page, tmp_path / 'x.png')
    page.get_by_text('x.png is no image that Pillow reads: choose a PNG').wait_for()


def test_a_huge_image_gets_a_message(page, tmp_path):
    Image.new('1', (8001, 8001)).save(tmp_path / 'x.png')
    page.reload()
    upload(page, tmp_path / 'x.png')
    page.get_by_text('x.png is 8001x8001, more than 64 megapixels: shrink it first').wait_for()
    (tmp_path / 'y.png').write_bytes(bytes(21_000_000))
    page.reload()
    upload(page, tmp_path / 'y.png')
    page.get_by_text('exceed the maximum allowed size of 20').wait_for()


def test_space(monkeypatch):
    front = RepoCard.load(SPACE / 'README.md').data
    assert front.sdk == 'gradio' and front.license == 'apache-2.0'
    assert (SPACE / 'requirements.txt').read_text().split() == ['timm_ham[demo]']
    started = []
    monkeypatch.setattr(demo, 'launch_demo', lambda: started.append(True))
    exec(compile(ast.parse((SPACE / front.app_file).read_text()), 'app.py', 'exec'), {})
    assert started == [True]
