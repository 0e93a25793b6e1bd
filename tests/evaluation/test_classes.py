"""A detector's classes are those of the annotations, in their order."""

from dataclasses import replace

import pytest

from quantrack.datasets.coco import Category, EvaluationSet, load_evaluation_set, require_same_categories
from quantrack.datasets.demo import demo_folder
from quantrack.errors import QuantrackError
from quantrack.evaluation.measure import detect, require_same_classes


@pytest.fixture(scope="module")
def pets() -> EvaluationSet:
    categories = (Category(1, "cat"), Category(7, "dog"), Category(9, "bird"))
    return replace(load_evaluation_set(demo_folder(), 1), categories=categories)


def test_names_in_order_or_of_another_language_are_taken(pets: EvaluationSet) -> None:
    require_same_classes(("cat", "dog", "bird"), pets, "model=pets.pt")
    require_same_classes(("chat", "chien", "oiseau"), pets, "model=pets.pt")


def test_another_number_is_refused(pets: EvaluationSet) -> None:
    with pytest.raises(QuantrackError, match=r"onnx=pets.onnx: detects 2 classes, but .*json has 3"):
        require_same_classes(("cat", "dog"), pets, "onnx=pets.onnx")


def test_the_same_names_in_another_order_are_refused(pets: EvaluationSet) -> None:
    with pytest.raises(QuantrackError, match=r"model=pets.pt: its class 1 is bird, but number 1 of .* by id is dog"):
        require_same_classes(("cat", "bird", "dog"), pets, "model=pets.pt")
    with pytest.raises(QuantrackError, match=r"model=pets.pt: its class 1 is bird, but number 1 of .* by id is dog"):
        require_same_classes(("cat", "bird", "Hund"), pets, "model=pets.pt")


def test_two_annotation_files_must_name_the_same_classes(pets: EvaluationSet) -> None:
    require_same_categories(pets, replace(pets, categories=(*pets.categories[:2], Category(90, "bird"))))
    with pytest.raises(QuantrackError, match=r"its category number 1 by id is bird, but dog in .*json"):
        require_same_categories(replace(pets, categories=(pets.categories[0], *pets.categories[:0:-1])), pets)
    with pytest.raises(QuantrackError, match=r"its category number 2 by id is missing, but bird in"):
        require_same_categories(replace(pets, categories=pets.categories[:2]), pets)


def test_a_picture_of_another_size_than_its_annotation_is_refused(pets: EvaluationSet) -> None:
    (picture,) = pets.pictures
    resized = replace(pets, pictures=(replace(picture, width=2 * picture.width),))
    said = rf"{picture.path.name}: has {picture.width} x {picture.height} pixels, but .* says {2 * picture.width} x"
    with pytest.raises(QuantrackError, match=said):
        detect(lambda images: images, 64, resized, "one2one")
