def test_trees(sysu_tree, regdb_tree, llcm_tree):
    assert (sysu_tree / "exp/test_id.txt").exists()
