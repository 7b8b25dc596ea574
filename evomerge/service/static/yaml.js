// The subset of YAML that the form writes: block mappings, with everything inside them on one line.

const PLAIN = /^[A-Za-z_./~][\w ./@+~-]*$/;
const WORDS = /^(true|false|yes|no|on|off|null|none|~)$/i;
const INDICATORS = /: | #|[ ]$/;

function scalar(value) {
  if (value === null) return "null";
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  return PLAIN.test(value) && !WORDS.test(value) && !INDICATORS.test(value) ? value : JSON.stringify(value);
}

function inline(value) {
  if (Array.isArray(value)) return `[${value.map(inline).join(", ")}]`;
  if (value && typeof value === "object") return `{${Object.entries(value).map(([k, v]) => `${scalar(k)}: ${inline(v)}`).join(", ")}}`;
  if (typeof value === "string" && /[,[\]{}]/.test(value)) return JSON.stringify(value);
  return scalar(value);
}

/** Plain data as YAML text; mappings are in block style down to a depth of `depth`. */
export function dump(content, depth = 2, indent = "") {
  return Object.entries(content).map(([key, value]) => {
    const isMapping = value && typeof value === "object" && !Array.isArray(value);
    if (isMapping && depth > 0 && Object.keys(value).length) return `${indent}${scalar(key)}:\n${dump(value, depth - 1, `${indent}  `)}`;
    return `${indent}${scalar(key)}: ${value && typeof value === "object" ? inline(value) : scalar(value)}\n`;
  }).join("");
}
