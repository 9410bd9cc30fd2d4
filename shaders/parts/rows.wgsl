// Rows that wait in workgroup memory to be rotated or stored. Prelude: ROWS, WIDTH (elements from a row to the next).

var<workgroup> rows: array<f32, ROWS * WIDTH>;
