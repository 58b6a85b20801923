"""Templates: sentences with `{}` for a label. The mean features of several describe a class better
than its bare label (Radford et al. 2021, section 3.1.4)."""

from pathlib import Path

from models.errors import InputError, near_names
from models.files import read_lines

TEMPLATE_SETS = {
    "none": ["{}"],
    "photo": ["a photo of a {}."],
    "ensemble": [
        "a photo of a {}.", "a picture of the {}.", "an image that shows a {}.",
        "a snapshot of one {}.", "a photograph of some {}.", "several {} in one picture.",
        "there is a {} in this photo.", "this is what a {} looks like.",
        "a {} seen from close by.", "a {} seen from far away.", "a {} that fills the frame.",
        "a {} at the edge of the picture.", "a {} in front of a plain background.",
        "a {} among many other things.", "a {} partly hidden by something else.",
        "a {} photographed from above.", "a {} photographed from below.",
        "a {} photographed from the side.", "a {} in bright daylight.", "a {} at night.",
        "a {} in the shade.", "a {} indoors.", "a {} outdoors.",
        "a sharp, detailed picture of a {}.", "a blurred picture of a {}.",
        "a grainy picture of a {}.", "a tiny thumbnail of a {}.", "an old photograph of a {}.",
        "a grey picture of a {}, without colours.", "a picture of a {} in strong colours.",
        "a pencil sketch of a {}.", "an oil painting with a {}.", "a child's drawing of a {}.",
        "an illustration of a {} from a book.", "a computer drawing of a {}.", "a beautiful {}.",
        "an unusual {}.", "an everyday {}.",
    ],
    "cn_photo": ["一张{}的照片。"],
    "cn_ensemble": [
        "一张{}的照片。", "一幅{}的图片。", "图中有{}。", "照片里可以看到{}。", "这是{}。",
        "{}的近景。", "{}的远景。", "{}的特写，占满画面。", "从上方拍摄的{}。", "从侧面拍摄的{}。",
        "阳光下的{}。", "夜晚的{}。", "室内的{}。", "室外的{}。", "一张清晰的{}照片。",
        "一张模糊的{}照片。", "一张很小的{}图片。", "一张{}的黑白照片。", "一张{}的老照片。",
        "{}的素描。", "{}的油画。", "{}的插图。", "电脑绘制的{}。", "许多{}。", "漂亮的{}。",
    ],
}  # fmt: skip


def read_templates(name: str) -> list[str]:
    """The templates of the set of that name, or of a text file with one a line; or `InputError`."""
    if name in TEMPLATE_SETS:
        return TEMPLATE_SETS[name]
    file = Path(name)
    if not file.exists():
        raise InputError(
            f"--templates {name}: neither a file nor a set"
            f"{near_names(name, TEMPLATE_SETS)}; the sets are {', '.join(TEMPLATE_SETS)}"
        )
    templates = read_lines(file, "template")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"{file}: the template {template!r:.80} has no {{}} for the label")
    return templates
