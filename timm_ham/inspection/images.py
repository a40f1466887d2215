"""Images from files, as a person gives them."""

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from timm_ham.errors import TimmHamError

__all__ = ['open_image']

MAX_PIXELS = 64_000_000  # more than cameras make; a few bytes of PNG can claim a picture that fills the memory


def open_image(path: Path) -> Image.Image:
    """Read an image file, upright, in RGB.

    Raises:
        TimmHamError: If the file is missing, is no image or a broken one, or has more than 64 million pixels.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise TimmHamError(f'{path.name} is {width}x{height}, more than 64 megapixels: shrink it first')
            return ImageOps.exif_transpose(image).convert('RGB')
    except Image.DecompressionBombError as error:
        raise TimmHamError(f'{path.name} has far more than 64 megapixels: shrink it first') from error
    except FileNotFoundError as error:
        raise TimmHamError(f'there is no file {path}: check its name') from error
    except UnidentifiedImageError as error:
        raise TimmHamError(f'{path.name} is no image that Pillow reads: choose a PNG or a JPEG, for example') from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, TimmHamError):
            raise
        raise TimmHamError(f'{path.name} can not be read ({error}): it is damaged, get it again') from error
