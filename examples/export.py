"""Takes the smallest network of a ladder that is good enough, and uses its file."""

# %% The smallest file that loses at most two points against FP32, of what ladder.py has left.
import shutil
from pathlib import Path

from bitladder.pipeline import Report
from bitladder.pipeline.packed_file import read_packed
from bitladder.pipeline.predict import predict
from PIL import Image
from sklearn.datasets import load_digits

report = Report("artifacts", "example")
good = report.frame[report.frame["drop"] <= 0.02]
stage = good.sort_values("packed_bytes")["stage"].iloc[0]
file = Path(shutil.copy(report.packed(stage), "digits.safetensors"))
print(f"{stage}: {file.stat().st_size / 1000:.1f} kB")

# %% The file holds the codes themselves, and says what it is.
packed = read_packed(file)
for name, weight in packed.weights.items():
    print(f"{name}: {tuple(weight.codes.shape)} at {weight.bits} bits")
print(packed.description.images.classes)

# %% Use it on images from files.
digits = load_digits()
for number in range(5):
    pixels = (digits.images[number] * 255 / 16).astype("uint8")
    Image.fromarray(pixels).save(f"digit-{number}.png")
files = [Path(f"digit-{number}.png") for number in range(5)]
for found, truth in zip(predict(file, files), digits.target, strict=False):
    label, share = found.classes[0]
    print(f"{found.image}: {label} ({100 * share:.0f} %), it is a {truth}")
