"""The prompts of an iteration."""

from megatron_vl.rl.iteration import prompts_of


def test_every_prompt_once_per_epoch():
    taken = [p for iteration in range(5) for p in prompts_of(iteration, 10, 50, seed=3)]
    assert sorted(taken) == list(range(50))
    assert taken != list(range(50))
    assert [p for i in range(5, 10) for p in prompts_of(i, 10, 50, seed=3)] != taken  # another order


def test_no_prompt_twice_in_one_iteration_across_epochs():
    for iteration in range(40):
        prompts = prompts_of(iteration, 13, 17, seed=1)
        assert len(prompts) == len(set(prompts)) == 13
    assert sorted(prompts_of(7, 17, 17, seed=1)) == list(range(17))
