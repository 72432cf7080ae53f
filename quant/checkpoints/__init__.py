"""A model's weights as a plan stores them: files that a consumer loads, their exact sizes told beforehand."""
