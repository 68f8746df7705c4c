"""Failed asserts of the conformance suite show their values, as those of test modules do."""

import pytest

pytest.register_assert_rewrite("tests.gateways.conformance")
