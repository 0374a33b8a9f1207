//! Typed access to key-value pairs.

use super::*;

#[test]
fn integers_of_any_type_are_taken_where_they_fit() {
    let metadata = every_type();
    assert_eq!(metadata.u32("u8").unwrap(), Some(255));
    assert_eq!(metadata.usize("u16").unwrap(), Some(65535));
    assert_eq!(metadata.u64("u64").unwrap(), Some(u64::MAX));
    assert_eq!(metadata.u32("absent").unwrap(), None);
    assert_says(
        &metadata.u32("u64").unwrap_err().to_string(),
        &["metadata key u64", "18446744073709551615 (u64)"],
    );
    assert_says(
        &metadata.u32("i8").unwrap_err().to_string(),
        &["metadata key i8", "-128"],
    );
    assert_eq!(metadata.i32s("u16s").unwrap(), Some(vec![0, 65535]));
    assert_says(
        &metadata.i32s("u32s").unwrap_err().to_string(),
        &["u32s", "array of u32"],
    );
}

#[test]
fn wrong_types_and_missing_keys_name_file_and_key() {
    let (_folder, path) = temporary("model.gguf");
    write(&path, &every_type(), &[]);
    let metadata = gguf::read(&path).unwrap().metadata;
    let file = path.to_str().unwrap();
    assert_says(
        &metadata.f32("string").unwrap_err().to_string(),
        &[file, "metadata key string", "floating-point"],
    );
    assert_says(
        &metadata.bool("u8").unwrap_err().to_string(),
        &[file, "metadata key u8", "bool"],
    );
    assert_says(
        &metadata.strings("f32s").unwrap_err().to_string(),
        &[file, "f32s", "array of strings"],
    );
    assert_says(
        &metadata.require_str("absent").unwrap_err().to_string(),
        &[file, "metadata key absent", "missing"],
    );
    assert_eq!(metadata.f32("f64").unwrap(), Some(0.0));
    assert_eq!(metadata.f32s("f64s").unwrap(), Some(vec![0.1]));
    assert_eq!(
        metadata.require_strings("strings").unwrap(),
        ["<s>", "", "▁a"]
    );
}

#[test]
fn inserting_replaces_in_place_and_removing_keeps_the_order() {
    let mut metadata: Metadata = [("a", 1_u32), ("b", 2), ("c", 3)].into_iter().collect();
    metadata.insert("a", "first");
    assert_eq!(metadata.remove("b"), Some(Value::U32(2)));
    let keys: Vec<&str> = metadata.iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["a", "c"]);
    assert_eq!(metadata.len(), 2);
}

#[test]
fn values_are_shown_on_one_short_line() {
    assert_eq!(Value::from(1e-5_f32).to_string(), "1e-5");
    assert_eq!(Value::from("a\nb").to_string(), r#""a\nb""#);
    assert_eq!(Value::from(vec![1_u8, 2]).to_string(), "[1, 2]");
    assert_eq!(
        Value::from(vec![0_i32; 32000]).to_string(),
        "[0, 0, 0, 0, …] (32000 × i32)"
    );
    let template = "{% for m in messages %}\n".repeat(100);
    let shown = Value::from(template).to_string();
    assert!(
        shown.chars().count() < 100 && shown.ends_with("… (2400 bytes)"),
        "{shown}"
    );
}

#[test]
fn json_keeps_numbers_short_and_arrays_abbreviated() {
    assert_eq!(Value::from(1e-5_f32).to_json(8).to_string(), "0.00001");
    assert_eq!(Value::from(f32::NAN).to_json(8), serde_json::Value::Null);
    assert_eq!(
        Value::from(u64::MAX).to_json(8).to_string(),
        "18446744073709551615"
    );
    assert_eq!(
        Value::from(vec![true, false]).to_json(8),
        serde_json::json!([true, false])
    );
    let long = Value::from(vec![7_u8; 9]).to_json(8);
    assert_eq!(
        long,
        serde_json::json!({"type": "u8", "len": 9, "first": [7, 7, 7, 7]})
    );
}
