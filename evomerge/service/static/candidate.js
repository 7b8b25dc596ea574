// One candidate: its figures, and copying.
import "./common.js";
import { start } from "./figures.js";

start();
