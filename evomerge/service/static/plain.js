// Pages that need nothing but copying.
import "./common.js";
