"""Tasks: which prompts are asked, what of the answers is measured. What learns beside the policy is in `training`."""
