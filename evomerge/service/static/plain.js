// For pages that only need copying.
import "./common.js";
