import pytest

import convmae


def segmenter():
    return convmae.create_segmenter("tiny", image_size=(64, 64), num_classes=3, head_width=16, auxiliary_width=8)


@pytest.mark.parametrize("load", [convmae.load_classifier, convmae.load_detector])
@pytest.mark.parametrize("name", ["encoder.stage3.1.ls1.gamma", "encoder.stage3.1.mlp.fc2.bias"])
def test_a_layer_scale_that_does_not_fit_its_layer_is_named(load, name):
    state = segmenter().state_dict()
    with pytest.raises(convmae.UserError, match=f"do not fit each other: .*{name}.* \\(191,\\)") as error:
        load({**state, name: state[name][:-1]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [convmae.load_classifier, convmae.load_detector])
def test_a_layer_that_a_segmenter_s_file_lacks_is_named_in_other_models_too(load):
    state = segmenter().state_dict()
    del state["encoder.stage3.1.mlp.fc2.bias"]
    with pytest.raises(convmae.UserError, match=r"the file lacks encoder\.stage3\.1\.mlp\.fc2\.bias"):
        load(state)
